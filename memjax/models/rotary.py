"""Rotary position embedding (arXiv:2104.09864), and its scalings for longer texts."""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.config.model import RopeScalingConfig
from memjax.ops.decode_attention.step import turn
from memjax.ops.precision import accumulator


def rotate(
    x: Float[Array, "b s n h"], positions: Int[Array, "b s"], theta: float, scaling: RopeScalingConfig | None = None
) -> Float[Array, "b s n h"]:
    """Rotates the pair (x[i], x[i + h/2]) by position * theta ** (-2 i / h), in Llama's layout."""
    return turn(x, *rotation(positions, x.shape[-1], theta, scaling, x.dtype))


def rotation(
    positions: Int[Array, "b s"], width: int, theta: float, scaling: RopeScalingConfig | None, dtype: DTypeLike
) -> tuple[Float[Array, "b s 1 half"], Float[Array, "b s 1 half"]]:
    """Cosines and sines of the angles by which `rotate` rotates heads of `width` columns."""
    wide = accumulator(jnp.dtype(dtype))
    angles = positions[..., None, None].astype(wide) * _frequencies(width // 2, theta, scaling, positions, wide)
    factor = 1.0 if scaling is None else attention_factor(scaling)
    cos, sin = ((function(angles) * factor).astype(dtype) for function in (jnp.cos, jnp.sin))
    return cos, sin


def attention_factor(scaling: RopeScalingConfig) -> float:
    """The factor on rotated queries and keys."""
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))
    sharper = lambda scale: 0.1 * scale * math.log(scaling.factor) + 1
    if scaling.mscale and scaling.mscale_all_dim:
        return sharper(scaling.mscale) / sharper(scaling.mscale_all_dim)
    return sharper(1)


def _frequencies(
    half: int, theta: float, scaling: RopeScalingConfig | None, positions: Int[Array, "b s"], wide: jnp.dtype
) -> Float[Array, "#b 1 1 half"]:
    """Angle of each pair between neighbouring positions, in radians; one per row if it depends on the row's length."""
    exponents = jnp.arange(half, dtype=wide)[None, None, None] / half
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    # As in transformers, the length is given by the highest position of a call.
    lengths = (jnp.max(positions, axis=1) + 1)[:, None, None, None].astype(wide)
    if scaling.kind == "dynamic":
        beyond = jnp.maximum(lengths / scaling.original_length, 1) - 1
        # (half / (half - 1)) is h / (h - 2).
        growth = (1 + scaling.factor * beyond) ** (half / max(half - 1, 1))
        return (theta * growth) ** -exponents
    if scaling.kind == "longrope":
        lists = (scaling.short_factor, scaling.long_factor)
        short, long = (jnp.asarray(factors, wide)[None, None, None] for factors in lists)
        return frequencies / jnp.where(lengths > scaling.original_length, long, short)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return jnp.asarray(_yarn(half, theta, scaling), wide)[None, None, None]
    return _slowed_down(frequencies, scaling)


def _slowed_down(frequencies: Float[Array, "1 1 1 half"], scaling: RopeScalingConfig) -> Float[Array, "1 1 1 half"]:
    """Divides slow frequencies, which made no full turn in pretraining, by the factor; fast ones are unchanged."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    speed = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(speed, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(half: int, theta: float, scaling: RopeScalingConfig) -> np.ndarray:
    """Keeps fast frequencies, divides slow ones by the factor, and blends those in between by their index."""

    def number(turns: float) -> float:
        """The (fractional) index of the frequency that makes that many turns within the original length."""
        return half * math.log(scaling.original_length / (2 * math.pi * turns)) / math.log(theta)

    first, last = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # transformers limits it by the width of a head, not by its number of frequencies.
    first, last = max(first, 0), min(last, 2 * half - 1)
    last = last + 0.001 if first == last else last
    # In float64, because they are constants of the program: rounded to float32 only once.
    numbers = np.arange(half, dtype=np.float64)
    slow = np.clip((numbers - first) / (last - first), 0, 1)
    return theta ** (-numbers / half) * (1 - slow + slow / scaling.factor)
