"""Decoders initialised with NumPy: compiling the initialisation would take longer than most tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.model import ModelConfig
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts


def drawn(config: ModelConfig, *, seed: int = 0, std: float = 0.5) -> Decoder:
    """A decoder whose parameters and tables are all drawn from a normal distribution with this standard deviation."""
    parts, rng = DecoderParts.of(config), np.random.default_rng(seed)
    fill = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * std, leaf.dtype))
    return parts.merge(fill(parts.abstract_params), fill(parts.abstract_tables))
