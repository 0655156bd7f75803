"""The moving average of dense parameters, and skipped updates, in the compiled step and across a restart."""

import dataclasses

import jax
import numpy as np
import pytest

import memjax
from memjax.checkpoint.checkpoints import Checkpoints
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import CheckpointError
from memjax.runs.layout import DATA_ITER, META, meta_document
from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training import spikes
from memjax.training.start import newest_state
from memjax.training.state import to_items
from memjax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

DECAY = 0.15


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same_bits(found, expected) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(found), leaves(expected), strict=True))


@pytest.mark.slow
def test_the_average_follows_the_updates_and_a_skipped_step_changes_nothing_but_its_number(tiny, tmp_path):
    config = tiny.config(f"--optim.ema_decay {DECAY} --optim.skip_step_sigma 6 --optim.schedule cosine")
    program, mesh = tiny.program_of(config), tiny.mesh(1, 1)
    batches = [tiny.micro_batches(batch, 1) for batch in tiny.batches(4)]
    with jax.set_mesh(mesh):
        step, state = make_train_step(program, mesh), tiny.quick_state(program, mesh)
        state = with_recent(state, spikes.none_yet())
        put = lambda batch: put_batch(mesh, batch, MICRO_BATCHES)
        average = None
        for number, batch in enumerate(batches[:3]):
            state, metrics = step(state, put(batch))
            now, decay = leaves(state.params), min(DECAY, number / (number + 9))
            average = (
                now if average is None else [decay * a + (1 - decay) * n for a, n in zip(average, now, strict=True)]
            )
            assert metrics["train/skipped_steps"] == 0
        for found, expected in zip(leaves(state.ema), average or [], strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)

        before = tiny.to_numpy(state)
        check_checkpoint(tiny, program, mesh, state, tmp_path)

        low = {name: np.full_like(before.recent[name], 1e-3) for name in ("loss", "grad_norm")}
        state = with_recent(state, before.recent | low)
        state, metrics = step(state, put(batches[3]))
        assert metrics["healthy"]
        assert metrics["train/skipped_steps"] == 1
        assert state.step == before.step + 1
        for name in ("params", "ema", "tables", "table_state"):
            assert same_bits(getattr(state, name), getattr(before, name)), name
        moments = lambda opt_state: [leaf for leaf in leaves(opt_state) if leaf.ndim]
        assert same_bits(moments(state.opt_state), moments(before.opt_state))

        # The learning rate follows the number of steps, not of the optimizer's updates.
        state = with_recent(state, before.recent)
        rate = program.schedule(4)
        state, metrics = step(state, put(batches[3]))
        assert metrics["train/lr"] == pytest.approx(float(rate))
        counts = [leaf for leaf in leaves(state.opt_state) if not leaf.ndim]
        assert sorted(set(map(int, counts))) == [4, 5], "moments count updates, schedules count steps"


def with_recent(state, recent):
    """The state, with other statistics of recent steps."""
    return dataclasses.replace(state, recent=jax.device_put(recent, state.step.sharding))


def check_checkpoint(tiny, program, mesh, state, path) -> None:
    """Checks that the average is restored bit for bit, loaded on request, and starts from the parameters if missing."""
    documents = {META: meta_document(program.config, ByteTokenizer(), step=3), DATA_ITER: {}}
    items = to_items(state)
    with Checkpoints(path / "with") as checkpoints:
        checkpoints.save(3, items, documents)
        checkpoints.wait()
        saved = newest_state(program, mesh, checkpoints)
        assert saved is not None
        assert same_bits(saved.state, state)
    trained, averaged = (memjax.load(path / "with", ema=ema) for ema in (False, True))
    kernel = lambda tree: np.asarray(tree["blocks"][0]["attention"]["query"]["kernel"][...])
    assert np.array_equal(np.asarray(trained.model.blocks[0].attention.query.kernel[...]), kernel(state.params))
    assert np.array_equal(np.asarray(averaged.model.blocks[0].attention.query.kernel[...]), kernel(state.ema))

    with Checkpoints(path / "without") as checkpoints:
        checkpoints.save(3, {name: item for name, item in items.items() if name not in ("ema", "recent")}, documents)
        checkpoints.wait()
        begun = newest_state(program, mesh, checkpoints)
    assert begun is not None
    assert same_bits(begun.state.ema, state.params)
    assert not np.isfinite(begun.state.recent["loss"]).any()
    with pytest.raises(CheckpointError, match=r"trained with optim.ema_decay have one.*; leave ema out"):
        memjax.load(path / "without", ema=True)
