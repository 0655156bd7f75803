"""A dense model with a memory beside its feed-forward layers computes the same function until it is trained."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memjax
from memjax.checkpoint import CheckpointError
from memjax.config.memory import MemoryConfig
from memjax.config.model import ExpertsConfig, ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import ConfigError
from memjax.interop.upcycle import upcycle, upcycle_run
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder
from memjax.runs.layout import params_to_tree
from memjax.runs.write import write_run

DENSE = ModelConfig(dim=16, num_layers=2, num_heads=2, ffn_dim=24, vocab_size=259, memory=None)
SIZES: dict[str, Any] = {"num_keys": 5, "num_heads": 2, "top_k": 3, "key_dim": 8}
BESIDE = MemoryConfig(layers=(0, 1), placement="parallel", output_gate=True, shared_table=False, value_dim=12, **SIZES)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(259, size=(2, 9)))

forward = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def dense() -> Decoder:
    parts, rng = DecoderParts.of(DENSE), np.random.default_rng(0)
    return parts.merge(
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype), parts.abstract_params), {}
    )


@pytest.fixture(scope="module")
def beside(dense) -> Decoder:
    return upcycle(dense, BESIDE, seed=1)


def test_a_memory_beside_feed_forward_layers_changes_no_logit(dense, beside):
    assert np.array_equal(forward(dense, TOKENS), forward(beside, TOKENS))
    assert sorted(beside.tables) == ["layer_0", "layer_1"]
    assert all(np.std(table.rows[...]) > 0.1 for table in beside.tables.values())
    assert [block.memory is not None for block in beside.blocks] == [True, True]


def test_the_memory_counts_once_its_scale_is_not_zero(beside):
    parts, params, tables = split_decoder(beside)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf, params)
    still = jax.tree.map(lambda leaf: 0 * leaf, tables)
    logits = [forward(parts.merge(moved, rows), TOKENS) for rows in (tables, still)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_replacing_feed_forward_layers_leaves_everything_else(dense):
    replaced = upcycle(dense, MemoryConfig(layers=(1,), **SIZES))
    assert replaced.blocks[1].feed_forward is None
    old, new = (
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(params_to_tree(params))[0]
        }
        for params in (split_decoder(dense)[1], split_decoder(replaced)[1])
    )
    gone = {name for name in old if name not in new}
    assert {name.split("'")[3:6:2] == ["1", "feed_forward"] for name in gone} == {True}
    assert len(gone) == 3
    assert all(new[name] is leaf for name, leaf in old.items() if name in new)
    assert {name.split("'")[5] for name in new if name not in old} == {"memory"}


def test_models_that_cannot_get_a_memory_are_refused(dense, beside):
    with pytest.raises(ValueError, match=r"already has memory layers, in blocks \[0, 1\]"):
        upcycle(beside, BESIDE)
    config = dataclasses.replace(DENSE, experts=ExpertsConfig(num_experts=2))
    experts = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="has experts in place of feed-forward layers; only a dense one can"):
        upcycle(experts, BESIDE)
    with pytest.raises(ValueError, match=r"memory\.layers=\[2\] must lie in 0\.\.1"):
        upcycle(dense, MemoryConfig(layers=(2,), **SIZES))
    with pytest.raises(ValueError, match=r"memory\.table_dtype=float64 would be float32, because JAX's 64-bit"):
        upcycle(dense, dataclasses.replace(BESIDE, table_dtype="float64"))


@pytest.mark.slow
def test_a_run_becomes_a_run(dense, tmp_path):
    write_run(tmp_path / "dense", dense, ByteTokenizer(), RunConfig(model=DENSE))
    upcycle_run(tmp_path / "dense", tmp_path / "memory", BESIDE, seed=1)
    loaded = memjax.load(tmp_path / "memory")
    assert loaded.config.model == dataclasses.replace(DENSE, memory=BESIDE)
    assert loaded.config.run.dir == str(tmp_path / "memory")
    assert np.array_equal(forward(loaded.model, TOKENS), forward(dense, TOKENS))
    refused = partial(upcycle_run, tmp_path / "dense")
    with pytest.raises(ConfigError, match="not empty"):
        refused(tmp_path / "memory", BESIDE)
    with pytest.raises(ValueError, match="must lie in"):
        refused(tmp_path / "new", MemoryConfig(layers=(2,), **SIZES))
    with pytest.raises(CheckpointError, match="no such folder"):
        upcycle_run(tmp_path / "none", tmp_path / "new", BESIDE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "memory"]
