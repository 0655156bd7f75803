"""Accumulation types, and initializers that draw in float32."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """float32, or the type itself where that is wider."""
    # Not jnp.promote_types: it refuses two types where jax_numpy_dtype_promotion is strict.
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def init_in_float32(init: Callable[..., Array]) -> Callable[..., Array]:
    """The initializer, drawing in float32 or wider before the cast.

    JAX draws bfloat16 from 128 values whose mean is off by 2 % of their standard deviation: over the inputs of a layer
    that adds up to a direction which all outputs share.
    """

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, *rest: Any) -> Array:
        return jnp.asarray(init(key, shape, accumulator(dtype), *rest), dtype)

    return draw
