"""The types that numbers are computed in, and initializers that draw in float32."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def resolve_dtype(name: str) -> jnp.dtype:
    """The type that a config names; 'auto' is bfloat16 on GPUs and TPUs, float32 on CPUs."""
    if name == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(name)


def truncated(dtypes: Mapping[str, str]) -> list[str]:
    """A message for each of these settings that asks for float64 while JAX's 64-bit types are off."""
    return [
        f"{name}=float64 would be float32, because JAX's 64-bit types are off; set the environment variable "
        f"JAX_ENABLE_X64=1, or --{name} float32"
        for name, dtype in dtypes.items()
        if dtype == "float64" and not jax.config.read("jax_enable_x64")
    ]


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The type in which sums are formed: float32, or float64 for float64."""
    # Not jnp.promote_types, which raises when jax_numpy_dtype_promotion is strict.
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def init_in_float32(init: Callable[..., Array]) -> Callable[..., Array]:
    """Wraps an initializer so that it draws in float32 or wider before the cast.

    JAX draws bfloat16 from 128 values whose mean is off by 2 % of their standard deviation; summed over the inputs of a
    layer, that gives all outputs a common direction.
    """

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, *rest: Any) -> Array:
        return jnp.asarray(init(key, shape, accumulator(dtype), *rest), dtype)

    return draw
