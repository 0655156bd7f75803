"""What the loop decides before anything is computed."""

from collections import deque
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from memjax.config.data import DataConfig
from memjax.errors import ConfigError
from memjax.monitoring.progress import ProgressLines, Stopwatch
from memjax.training.trainer import PATIENCE, FirstBatches, Loop, _Pending


def batch(learned: int) -> dict[str, np.ndarray]:
    mask = np.zeros((4, 8), np.float32)
    mask.flat[:learned] = 1
    return {"loss_mask": mask}


def test_a_cut_before_everything_that_is_learned_is_refused_by_name():
    first_batches = FirstBatches(DataConfig(packing="none", sequence_length=8))
    for _ in range(PATIENCE - 1):
        first_batches.look(batch(0), last=False)
    with pytest.raises(ConfigError) as error:
        first_batches.look(batch(0), last=False)
    assert str(error.value) == (
        "data.sequence_length=8 is too short for data.packing=none, which cuts every record there: no token of the "
        "first 8 batches is learned; raise data.sequence_length, or set data.packing to first_fit"
    )


def test_a_run_that_ends_before_it_has_learned_anything_is_refused_too():
    first_batches = FirstBatches(DataConfig(source="jsonl", path="x", packing="concat", batch_size=4))
    first_batches.look(batch(0), last=False)
    with pytest.raises(ConfigError) as error:
        first_batches.look(batch(0), last=True)
    assert str(error.value) == (
        "data.sequence_length=64 x data.batch_size=4 holds nothing but prompts: no token of the first 2 batches is "
        "learned; raise one of them, or look at what the records have under data.answer_key=answer"
    )


def test_after_one_learned_token_everything_may_come():
    first_batches = FirstBatches(DataConfig())
    for learned in (0, 0, 1, *[0] * (2 * PATIENCE)):
        first_batches.look(batch(learned), last=False)
    first_batches.look(batch(0), last=True)


class UnderWay:
    """A value that a device has not computed yet: to read it would wait."""

    def __array__(self, *_, **__):
        raise AssertionError("the loop waits for the newest step")


def test_the_newest_step_stays_under_way_while_the_next_is_made_ready():
    loop = Loop.__new__(Loop)
    loop.pending = deque([_Pending(1, {"train/loss": UnderWay(), "healthy": UnderWay()}, {})])
    loop._read()
    assert len(loop.pending) == 1


def test_a_step_whose_run_cannot_be_recorded_yet_keeps_its_place():
    def record(step: int) -> None:
        raise OSError(28, "No space left on device")

    loop = Loop.__new__(Loop)
    loop.stopwatch, loop.first, loop.record = Stopwatch(), 0, record
    loop.pending = deque([_Pending(1, {"train/loss": np.float32(1), "healthy": np.bool_(True)}, {})])
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            loop._read(keep=0)
        assert [pending.step for pending in loop.pending] == [1]


def test_a_pause_in_training_leaves_every_step_its_own_time():
    loop, written = Loop.__new__(Loop), []
    loop.state = SimpleNamespace(step=np.int32(2))
    loop.stopwatch, loop.first, loop.tokens_seen, loop.must_stop = Stopwatch(), 0, 0, False
    loop.peak_flops = loop.compile_seconds = loop.metrics = None
    loop.record, loop.trackers = (lambda step: None), []
    loop.progress = cast(ProgressLines, SimpleNamespace(show=written.append))
    metrics = lambda: {"train/loss": np.float32(1), "train/tokens": np.int32(8), "healthy": np.bool_(True)}
    loop.pending = deque(_Pending(step, metrics(), {}) for step in (1, 2))
    with loop._aside():
        assert [row["step"] for row in written] == [1]
        assert [pending.step for pending in loop.pending] == [2]
