"""RMSNorm in plain XLA, which fuses it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.ops.precision import accumulator


def rms_norm(x: Float[Array, "t d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "t d"]:
    """The reference's formula."""
    wide = x.astype(accumulator(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * (inverse * scale[None, :].astype(wide.dtype))).astype(x.dtype)
