"""Rotary position embedding (arXiv:2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator


def rotate(x: Float[Array, "b s n h"], positions: Int[Array, "b s"], theta: float) -> Float[Array, "b s n h"]:
    """Turns the pair (x[i], x[i + h/2]) by position * theta ** (-2 i / h), in float32 or wider: Llama's layout."""
    half = x.shape[-1] // 2
    wide = accumulator(x.dtype)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions[..., None, None].astype(wide) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
