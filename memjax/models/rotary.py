"""Rotary position embedding (arXiv:2104.09864)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.config import RopeScalingConfig
from memjax.ops.precision import accumulator


def rotate(
    x: Float[Array, "b s n h"], positions: Int[Array, "b s"], theta: float, scaling: RopeScalingConfig | None = None
) -> Float[Array, "b s n h"]:
    """Turns the pair (x[i], x[i + h/2]) by position * theta ** (-2 i / h), in float32 or wider: Llama's layout."""
    half = x.shape[-1] // 2
    wide = accumulator(x.dtype)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    if scaling is not None:
        frequencies = _slowed_down(frequencies, scaling)
    angles = positions[..., None, None].astype(wide) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _slowed_down(frequencies: Float[Array, " half"], scaling: RopeScalingConfig) -> Float[Array, " half"]:
    """Slow frequencies, which never came round in the first training, divided by the factor; fast ones as they are."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    speed = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(speed, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
