"""Models initialised with NumPy: compiling the initialisation would take longer than most tests."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.config.model import ModelConfig
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts

Module = TypeVar("Module", bound=nnx.Module)


def drawn(config: ModelConfig, *, seed: int = 0, std: float = 0.5) -> Decoder:
    """A decoder whose parameters and tables are all drawn from a normal distribution with this standard deviation."""
    parts, fill = DecoderParts.of(config), _filler(seed, std)
    return parts.merge(fill(parts.abstract_params), fill(parts.abstract_tables))


def filled(build: Callable[[], Module], *, seed: int = 0, std: float = 0.5) -> Module:
    """A module of which everything is drawn likewise."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, _filler(seed, std)(state))


def _filler(seed: int, std: float) -> Callable[[Any], Any]:
    rng = np.random.default_rng(seed)
    return functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * std, leaf.dtype))
