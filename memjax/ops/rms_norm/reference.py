"""RMSNorm by its formula."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.ops.precision import accumulator


def rms_norm(x: Float[Array, "t d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "t d"]:
    """y = scale * x / sqrt(mean(x**2) + epsilon), in float32 or wider, in x's type."""
    wide = x.astype(accumulator(x.dtype))
    inverse = 1 / jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale[None, :]).astype(x.dtype)
