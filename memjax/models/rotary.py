"""Rotary position embedding (arXiv:2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "b s n h"], positions: Int[Array, "b s"], theta: float) -> Float[Array, "b s n h"]:
    """Turns the pair (x[i], x[i + h/2]) by position * theta ** (-2 i / h): Llama's layout, angles in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
