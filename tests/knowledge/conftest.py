"""Small models initialised with NumPy: compiling the initialisation would take longer than the tests."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from drawn import drawn
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ModelConfig
from memjax.models.decoder import Decoder

SIZES: dict[str, Any] = {"dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24, "vocab_size": 259}
LOOKUP: dict[str, Any] = {"num_keys": 6, "num_heads": 2, "top_k": 3, "key_dim": 8, "shared_table": False}
KINDS: dict[str, dict[str, Any]] = {
    "memory_plus": {"memory": MemoryConfig(layers=(0, 2), value_dim=12, **LOOKUP)},
    "plain": {"memory": MemoryConfig(layers=(0, 2), gate="none", **LOOKUP)},
    "gated_beside": {"memory": MemoryConfig(layers=(0, 2), output_gate=True, placement="parallel", **LOOKUP)},
    "post_norms": {"memory": MemoryConfig(layers=(0, 2), value_dim=12, **LOOKUP), "norm_placement": "post"},
    "peer": {"memory": None, "peer": PEERConfig(layers=(0, 2), **LOOKUP)},
}


def config_of(kind: str) -> ModelConfig:
    return ModelConfig(**SIZES, **KINDS[kind])


@functools.cache
def draw(kind: str) -> Decoder:
    return drawn(config_of(kind))


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Decoder]:
    """model_of(kind): a model with two layers of one of `KINDS`, each with its own table."""
    return draw
