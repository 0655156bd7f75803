"""The root mean square norm for XLA, which needs to see no more than a sum of squares and a product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.ops.precision import accumulator


def rms_norm(x: Float[Array, "t d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "t d"]:
    """The reference's formula."""
    wide = x.astype(accumulator(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * (inverse * scale[None, :].astype(wide.dtype))).astype(x.dtype)
