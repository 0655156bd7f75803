"""The training step with a memory and a PEER layer, in double precision, on meshes and against plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.memory import sharded

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

STEPS, HEADS, TOP_K = 4, 2, 3
MODEL = f"""
--model.dim 256 --model.memory.layers 0
--model.peer.layers 1 --model.peer.num_keys 8 --model.peer.num_heads {HEADS}
--model.peer.top_k {TOP_K} --model.peer.key_dim 8 --model.peer.table_dtype float64
--optim.table.state_columns 64 --optim.table.lr 10.0
"""
EXPERTS = ("experts_inputs", "experts_outputs")


def plain_bag(table, indices, weights, perturbation=None, **_):
    """The bag in plain JAX, differentiated without our custom rule."""
    out = jnp.einsum("tk,tkd->td", weights, table[indices])
    return out if perturbation is None else out + perturbation


def plain_dot(table, indices, vectors, perturbation=None, **_):
    """The dot, likewise."""
    out = jnp.einsum("tkd,td->tk", table[indices], vectors)
    return (out if perturbation is None else out + perturbation), vectors


@pytest.fixture(scope="module")
def trained(tiny, float64):
    """trained(settings, mesh): the result of a few steps with a large rate for the tables, cached."""

    @functools.cache
    def run(settings: str, mesh_shape: tuple[int, int] = (1, 1)):
        mesh = "--mesh.data {} --mesh.memory {}".format(*mesh_shape)
        config = tiny.config(MODEL, "--optim.table.optimizer", settings, mesh, wide=True)
        with pytest.MonkeyPatch.context() as patch:
            if config.optim.table.is_dense:
                patch.setattr(sharded, "bag", plain_bag)
                patch.setattr(sharded, "dot", plain_dot)
            return tiny.train(config, tiny.batches(2) * (STEPS // 2), mesh_shape)

    return run


def assert_same_movement(this, other, tolerance):
    """Checks that every table and parameter changed as in the other run, relative to the size of the change."""
    for what in ("tables", "params"):
        leaves = [jax.tree.leaves(getattr(state, what)) for run in (this, other) for state in (run.before, run.after)]
        for before, after, other_before, other_after in zip(*leaves, strict=True):
            way = other_after - other_before
            assert np.linalg.norm(way) > 0
            assert np.linalg.norm(after - before - way) <= tolerance * np.linalg.norm(way)


def test_row_updates_of_micro_batches_are_plain_sgd_on_the_whole_batch(trained):
    rows, plain = trained("sgd --train.grad_accum_steps 2"), trained("dense_sgd")
    assert rows.losses[-1] < rows.losses[0] - 0.1, "a model that does not learn proves little"
    np.testing.assert_allclose(rows.losses, plain.losses, rtol=1e-11)
    assert set(rows.after.tables) == {"shared", *EXPERTS}
    assert_same_movement(rows, plain, 1e-10)


@pytest.mark.parametrize("mesh_shape", [(1, 2), (2, 4)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_every_mesh_trains_the_same_model(trained, mesh_shape):
    alone, split = trained("sgd --train.grad_accum_steps 2"), trained("sgd", mesh_shape)
    np.testing.assert_allclose(split.losses, alone.losses, rtol=1e-7)
    assert_same_movement(split, alone, 1e-7)
    for name in EXPERTS:
        assert {shard.data.shape for shard in split.live.tables[name].addressable_shards} == {
            (64, 256 // mesh_shape[1])
        }


def test_reads_of_both_kinds_are_counted(tiny, trained):
    found = trained("sgd --train.grad_accum_steps 2").after.reads
    real = sum((batch["segments"] > 0).sum() for batch in tiny.batches(2)) * STEPS // 2
    assert {name: reads.sum() for name, reads in found.items()} == dict.fromkeys(("L0", "L1"), real * HEADS * TOP_K)
