"""In which type sums are formed."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """float32, or the type itself where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)
