"""The training step: replicas, bad gradients and statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.memory import sharded
from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training.step import abstract_batch, make_train_step, make_usage_report

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.slow
def test_in_float32_one_step_is_that_of_plain_sgd_and_of_one_batch(tiny):
    # A single step from equal states, since near ties between slots make longer runs diverge.
    batches = tiny.batches(1)
    rate = "--optim.table.lr 100.0 --optim.table.optimizer"
    plain = tiny.train(tiny.config(rate, "dense_sgd"), batches)
    before, expected = plain.before.tables["shared"], plain.after.tables["shared"]
    moved = np.linalg.norm(expected - before)
    assert moved > 0.1 * np.linalg.norm(before)
    for way in ("sgd", "dense_sgd"):
        cut = tiny.train(tiny.config(rate, way, "--train.grad_accum_steps 4"), batches)
        assert np.linalg.norm(cut.after.tables["shared"] - expected) <= 1e-5 * moved
        np.testing.assert_allclose(cut.losses, plain.losses, rtol=1e-6)
        norms = [run.metrics[0]["train/grad_norm"] for run in (cut, plain)]
        np.testing.assert_allclose(*norms, rtol=1e-6)


@pytest.mark.slow
def test_replicas_of_a_stochastically_rounded_table_stay_bit_equal(tiny):
    config = tiny.config(
        "--model.memory.table_dtype bfloat16 --optim.table.state_columns 64 --mesh.data 2 --mesh.memory 4",
        "--mesh.dense replicated",
    )
    state = tiny.train(config, tiny.batches(20), (2, 4)).live
    assert state.step == 20
    replicated = 0
    for array in jax.tree.leaves(state):
        copies: dict[str, set[bytes]] = {}
        for shard in array.addressable_shards:
            copies.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
        assert all(len(values) == 1 for values in copies.values())
        replicated += len(copies) < len(array.addressable_shards)
    assert replicated == len(jax.tree.leaves(state))
    table = state.tables["shared"]
    assert table.dtype == jnp.bfloat16
    assert {shard.data.shape for shard in table.addressable_shards} == {(64, 64)}
    assert state.table_state["shared"]["second_moment"].addressable_shards[0].data.shape == (64, 1)


@pytest.mark.slow
def test_a_nan_in_one_perturbation_leaves_everything_as_it_was(tiny, monkeypatch):
    # Only one device's columns and tokens have the NaN, but all devices must skip the step.
    program, mesh = tiny.program_of(tiny.config("--optim.table.state_columns 64")), tiny.mesh(2, 2)
    with jax.set_mesh(mesh):
        state = tiny.quick_state(program, mesh)
        drawn = tiny.batches(4)
        num_learned = drawn[0]["loss_mask"].sum()
        drawn[1]["loss_mask"][:] = 0
        batches = [put_batch(mesh, tiny.micro_batches(batch, 1), MICRO_BATCHES) for batch in drawn]
        step, report = make_train_step(program, mesh), make_usage_report(program, mesh)
        for batch, learned in zip(batches[:2], (num_learned, 0), strict=True):
            state, metrics = step(state, batch)
            assert metrics["healthy"]
            assert metrics["train/target_tokens"] == learned
            assert (metrics["train/loss"] == 0) == (learned == 0)
        check_usage(tiny, state, report)

        good = dataclasses.replace(tiny.to_numpy(state), healthy=np.zeros((), bool))
        monkeypatch.setattr(sharded, "bag", tiny.poisoned_bag(1))
        bad = make_train_step(program, mesh)
        state, metrics = bad(state, batches[2])
        # The dense gradient does not depend on the perturbation's cotangent, so loss and norm look healthy.
        assert np.isfinite(metrics["train/loss"])
        assert np.isfinite(metrics["train/grad_norm"])
        assert not metrics["healthy"]
        assert_same_bits(state, good)
        state, metrics = step(state, batches[3])
        assert not metrics["healthy"], "a later step must not continue from a bad one"
        assert_same_bits(state, good)
        assert state.step == 2


FAMILIES = {
    "memory": "",
    "dense": "--model.memory null",
    "peer": "--model.memory null --model.peer.layers 1 --model.peer.num_keys 8 --model.peer.key_dim 8",
    "experts": "--model.memory null --model.experts.layers 1 --model.experts.num_experts 4",
    "experts that choose": "--model.memory null --model.experts.layers 1 --model.experts.routing expert_choice",
    "bfloat16": "--model.dtype bfloat16 --model.param_dtype bfloat16 --model.memory.table_dtype bfloat16",
    "dense optimizer of tables": "--optim.table.optimizer dense_adam --train.grad_accum_steps 2",
    "every option of the optimizer": "--optim.ema_decay 0.9 --optim.skip_step_sigma 6 --optim.clip_tables joint "
    "--optim.table.optimizer adam --optim.schedule wsd --optim.table.schedule cosine --train.grad_accum_steps 2",
}


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_every_family_trains_where_jax_promotes_no_types(tiny, settings):
    config, mesh = tiny.config(settings), tiny.mesh(1, 1)
    program = tiny.program_of(config)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        make_train_step(program, mesh).trace(program.abstract_state, abstract_batch(config))


def assert_same_bits(state, expected):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    assert all(np.asarray(found).tobytes() == wanted.tobytes() for found, wanted in pairs)


def check_usage(tiny, state, report):
    """Checks that reads of two steps are counted without padding, and that the report uses and resets them."""
    real = sum((batch["segments"] > 0).sum() for batch in tiny.batches(2))
    counts = {name: np.array(reads) for name, reads in state.reads.items()}
    assert set(counts) == {"L0", "L1"}
    after, metrics = report(jax.tree.map(jnp.copy, state))
    for name, reads in counts.items():
        assert reads.sum() == real * 2 * 3
        share = reads[reads > 0] / reads.sum()
        expected = {
            "used_fraction": np.count_nonzero(reads) / 64,
            "dead_fraction": 1 - np.count_nonzero(reads) / 64,
            "effective_fraction": np.exp(-np.sum(share * np.log(share))) / 64,
            "top1_share": share.max(),
        }
        found = {field: metrics[f"memory/{name}/{field}"] for field in expected}
        assert found == pytest.approx(expected, rel=1e-5)
        assert not np.any(after.reads[name])
