"""A saved model is loaded unchanged, on one device or several, whatever machine it was trained on."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memjax
from memjax.checkpoint import CheckpointError, Checkpoints
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from memjax.errors import ConfigError
from memjax.io import remote
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder, writable
from memjax.runs.layout import meta_document, params_to_tree, tree_to_params
from memjax.runs.load import load

TOKENS = jnp.asarray([[1, 5, 9, 200], [1, 8, 7, 6]])


def run_config(memory: bool = True, **model) -> RunConfig:
    small = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, key_dim=8, value_dim=32)
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 259}
    experts = PEERConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8, table_dtype="float32")
    lookups = {"memory": small, "peer": experts} if memory else {"memory": None}
    return RunConfig(model=ModelConfig(**sizes, **lookups, **model))


forward = nnx.jit(lambda model, tokens: model(tokens))


@functools.cache
def build(config: ModelConfig, seed: int) -> Decoder:
    parts, rng = DecoderParts.of(config), np.random.default_rng(seed)
    # Drawn by NumPy, since compiling the initialisation would take longer than the tests.
    fill = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype))
    return parts.merge(fill(parts.abstract_params), fill(parts.abstract_tables))


def save(folder, run: RunConfig, step: int = 3, loss: float | None = None, **changes) -> Decoder:
    """Saves a checkpoint as training does, with an item that loading must ignore."""
    model = build(run.model, step)
    _, params, tables = split_decoder(model)
    document = meta_document(run, ByteTokenizer(), step=step) | changes
    with Checkpoints(folder / "checkpoints", block_bytes=4096) as checkpoints:
        items = {"params": params_to_tree(params), "tables": tables, "opt_state": {"count": jnp.zeros(())}}
        checkpoints.save(step, items, {"meta": document}, loss=loss)
    return model


def equal_bits(left: Decoder, right: Decoder) -> bool:
    pairs = [split_decoder(model)[1:] for model in (left, right)]

    def same(a: jax.Array, b: jax.Array) -> bool:
        return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    return jax.tree.all(jax.tree.map(same, *pairs))


@pytest.mark.parametrize("memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_loaded_is_what_was_saved(tmp_path, memory):
    config = run_config(memory)
    saved = save(tmp_path, config)
    for path in (tmp_path, str(tmp_path / "checkpoints")):
        found = load(path)
        assert equal_bits(found.model, saved)
        assert (found.config, found.step) == (config, 3)
    model, tokenizer = load(tmp_path)
    np.testing.assert_array_equal(forward(model, TOKENS), forward(saved, TOKENS))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.decode(tokenizer.encode("né")) == "né"
    assert memjax.load is load


def test_a_run_elsewhere_is_loaded_by_its_address(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = run_config()
    save(tmp_path / "run", config, step=2)
    saved = save(tmp_path / "run", config, step=3)
    remote.push(tmp_path / "run", "memory://test_load/run")
    found = load("memory://test_load/run")
    assert equal_bits(found.model, saved)
    assert found.step == 3
    assert not [*(tmp_path / "cache").rglob("checkpoints/2")], "only what is loaded is copied"
    older = load("memory://test_load/run", step=2)
    assert older.step == 2
    # Its local copy has only this step: finding the folder fetches no other.
    assert [path.name for path in older.checkpoints.iterdir() if path.name.isdecimal()] == ["2"]
    assert older.folder == older.checkpoints.parent
    for path, problem in (("memory://test_load/none", "cannot be read"), ("hdfs://a/run", "must be a path")):
        with pytest.raises(CheckpointError, match=problem):
            load(path)


def test_a_mesh_gets_the_same_model_split_by_columns(tmp_path, mesh):
    saved = save(tmp_path, run_config())
    with jax.set_mesh(mesh):
        model, _ = load(tmp_path)
        tables = writable(split_decoder(model)[2])
        assert {shard.data.shape for shard in tables["shared"].addressable_shards} == {(64, 8)}
        spread = np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.tile(TOKENS, (4, 1))))
    assert equal_bits(model, saved)
    np.testing.assert_allclose(spread[:2], forward(saved, TOKENS), rtol=1e-4, atol=1e-5)


def test_columns_that_a_mesh_cannot_split_are_refused(tmp_path):
    save(tmp_path, run_config())
    automatic = (jax.sharding.AxisType.Auto,) * 2
    odd = jax.make_mesh((1, 3), ("data", "memory"), axis_types=automatic, devices=jax.devices("cpu")[:3])
    with jax.set_mesh(odd), pytest.raises(CheckpointError, match="32 columns cannot be split evenly over 3 devices"):
        load(tmp_path)


def test_a_table_saved_in_bfloat16_is_widened_where_the_machine_computes_in_float32(tmp_path):
    config = run_config()
    assert config.model.memory is not None
    narrow = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, memory=dataclasses.replace(config.model.memory, table_dtype="bfloat16")
        ),
    )
    saved = save(tmp_path / "named", narrow)
    kept, _ = load(tmp_path / "named")
    assert equal_bits(kept, saved)

    # As saved with 'auto' on a GPU.
    model = build(narrow.model, 3)
    _, params, tables = split_decoder(model)
    document = meta_document(config, ByteTokenizer(), step=1) | {
        "table_dtypes": {"memory": "bfloat16", "peer": "float32"}
    }
    with Checkpoints(tmp_path / "auto" / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params_to_tree(params), "tables": tables}, {"meta": document})
    wide = split_decoder(load(tmp_path / "auto").model)[2]["shared"]
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, writable(tables)["shared"].astype(jnp.float32))


def test_dtype_is_that_of_everything(tmp_path):
    save(tmp_path, run_config())
    model, _ = load(tmp_path, dtype=jnp.bfloat16)
    _, params, tables = split_decoder(model)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, tables))} == {jnp.dtype(jnp.bfloat16)}
    assert nnx.eval_shape(lambda model: model.hidden(TOKENS)[0], model).dtype == jnp.bfloat16


def test_the_step_is_the_latest_the_best_or_a_number(as_users_call, tmp_path):
    config = run_config(memory=False)
    saved = {step: save(tmp_path, config, step, loss) for step, loss in ((2, 1.0), (4, 2.0))}
    wanted: dict[int | Literal["latest", "best"], int] = {"latest": 4, "best": 2, 2: 2}
    for step, number in wanted.items():
        found = load(tmp_path, step=step)
        assert found.step == number
        assert equal_bits(found.model, saved[number])
    with pytest.raises(CheckpointError, match="there is no step 3"):
        load(tmp_path, step=3)
    with pytest.raises(ConfigError, match="step='last' must be latest, best or the number of a checkpoint"):
        load(tmp_path, step="last")  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_loaded_is_explained(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"download org/some-1\.5 --local-dir some-1\.5`, .*from-hf some-1\.5 --out"
    ):
        load("org/some-1.5")
    with pytest.raises(
        CheckpointError, match=r"missing: there is no such folder; name the folder of a run \(run.dir\)$"
    ):
        load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="there is no checkpoint in it"):
        load(tmp_path)
    config = run_config(memory=False)
    save(tmp_path / "new", config, format=4)
    with pytest.raises(CheckpointError, match="has format 4, this version of memjax reads 1 to 3"):
        load(tmp_path / "new")
    save(tmp_path / "other", config, config={"model": {"dim": "wide"}})
    with pytest.raises(CheckpointError, match=r"config is not one of this version: model\.dim"):
        load(tmp_path / "other")
    save(tmp_path / "double", run_config(memory=False), config=dataclasses.asdict(run_config(param_dtype="float64")))
    with pytest.raises(CheckpointError, match="set JAX_ENABLE_X64=1"):
        load(tmp_path / "double")
    with pytest.raises(CheckpointError, match="no step was saved with a validation loss"):
        load(tmp_path / "new", step="best")
    changes: tuple[dict[str, Any], ...] = ({"config": 5}, {"table_dtypes": "x"}, {"tokenizer": None}, {"tokenizer": {}})
    for number, change in enumerate(changes):
        save(tmp_path / f"odd{number}", config, **change)
        with pytest.raises(CheckpointError, match=r"meta document is malformed|tokenizer cannot be read"):
            load(tmp_path / f"odd{number}")


def test_parameters_become_a_tree_and_come_back():
    parts, params, _ = split_decoder(build(run_config().model, 3))
    tree = params_to_tree(params)
    assert set(tree["blocks"]) == {"0", "1"}
    back = tree_to_params(parts, tree)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(new is old for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))
    shapes = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params_to_tree(DecoderParts.of(run_config().model).abstract_params)
    )
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    del tree["norm"]
    with pytest.raises(KeyError, match="norm"):
        tree_to_params(parts, tree)
