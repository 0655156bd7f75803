import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ModelConfig
from memjax.memory.table import TableRows
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder

SIZES: dict[str, Any] = {"dim": 8, "num_layers": 2, "num_heads": 2, "ffn_dim": 8, "vocab_size": 16}
MEMORY: dict[str, Any] = {"layers": (0, 1), "num_keys": 3, "num_heads": 1, "top_k": 2, "key_dim": 4, "value_dim": 6}
CONFIGS = {
    "dense": ModelConfig(**SIZES, memory=None),
    "memory": ModelConfig(**SIZES, memory=MemoryConfig(**MEMORY, shared_table=False, table_dtype="bfloat16")),
    "experts": ModelConfig(
        **SIZES,
        memory=None,
        peer=PEERConfig(num_keys=3, num_heads=1, top_k=2, key_dim=4, table_dtype="bfloat16"),
    ),
}
TABLES = {"dense": [], "memory": ["layer_0", "layer_1"], "experts": ["experts_inputs", "experts_outputs"]}


def shapes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_split_and_merged_is_the_same(name):
    abstract = DecoderParts.of(CONFIGS[name])

    def fill(tree):
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), tree)

    model = abstract.merge(fill(abstract.abstract_params), fill(abstract.abstract_tables))
    parts, params, tables = split_decoder(model)
    assert shapes((parts.abstract_params, parts.abstract_tables)) == shapes((params, tables))
    again = parts.merge(params, tables)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    one, other = nnx.state(again), nnx.state(model)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for got, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert got is expected, "nothing is copied"
    assert sorted(tables) == TABLES[name]
    assert not jax.tree.leaves(nnx.filter_state(params, TableRows))


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_a_config_have_the_structure_of_its_decoder(name):
    parts = DecoderParts.of(CONFIGS[name])
    model = nnx.eval_shape(lambda: Decoder(CONFIGS[name], rngs=nnx.Rngs(0)))

    def zeros(tree):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    again = parts.merge(zeros(parts.abstract_params), zeros(parts.abstract_tables))
    assert nnx.graphdef(again) == nnx.graphdef(model)
    assert shapes(nnx.state(again)) == shapes(nnx.state(model))


def test_init_draws_what_the_parts_describe():
    parts = DecoderParts.of(CONFIGS["memory"])
    params, tables = jax.jit(parts.init)(jax.random.key(0))
    assert shapes(params) == shapes(parts.abstract_params)
    assert shapes(tables) == shapes(parts.abstract_tables)
    assert jax.tree.structure(params) == jax.tree.structure(parts.abstract_params)
    drawn = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves((params, tables)) if leaf.ndim > 1]
    assert all(np.std(leaf) > 0.01 for leaf in drawn)
    assert np.any(drawn[-1] != drawn[-2]), "each table is drawn on its own"


def test_perturbations_are_zeros_of_the_shapes_and_types_of_what_is_read():
    found = {name: DecoderParts.of(config).zero_perturbations(10) for name, config in CONFIGS.items()}
    bag = [((10, 6), "bfloat16")]
    assert {name: shapes(zeros) for name, zeros in found["memory"].items()} == {"L0": bag, "L1": bag}
    # Products are summed in float32.
    assert {name: shapes(zeros) for name, zeros in found["experts"].items()} == {
        "L1": [((10, 2), "float32"), ((10, 8), "bfloat16")]
    }
    assert not any(np.any(zeros) for zeros in jax.tree.leaves(found))
    assert found["dense"] == {}


def test_the_time_to_describe_a_decoder_grows_with_its_layers_and_not_with_their_square(monkeypatch):
    """Asked for the sharding of a traced value, JAX walks through the whole trace to explain the error."""
    asked = []

    def sharding(tracer):
        asked.append(tracer)
        raise AttributeError("traced")

    monkeypatch.setattr(jax.core.Tracer, "sharding", property(sharding))
    counts = []
    for num_layers in (2, 6):
        DecoderParts.of(dataclasses.replace(CONFIGS["memory"], num_layers=num_layers))
        counts.append(len(asked))
        asked.clear()
    assert counts[0] == counts[1]
