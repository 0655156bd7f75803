"""Data from which nothing would be learned is refused with the reason."""

import numpy as np
import pytest

from memjax.config.data import DataConfig
from memjax.errors import ConfigError
from memjax.training.first_batches import PATIENCE, FirstBatches


def batch(learned: int) -> dict[str, np.ndarray]:
    mask = np.zeros((4, 8), np.float32)
    mask.flat[:learned] = 1
    return {"loss_mask": mask}


def test_a_cut_before_everything_that_is_learned_is_refused_by_name():
    first_batches = FirstBatches(DataConfig(packing="none", sequence_length=8))
    for _ in range(PATIENCE - 1):
        first_batches.check(batch(0), last=False)
    with pytest.raises(ConfigError) as error:
        first_batches.check(batch(0), last=False)
    assert str(error.value) == (
        "data.sequence_length=8 is too short for data.packing=none, which cuts every record there: no token of the "
        "first 8 batches counts in the loss; raise data.sequence_length, or set data.packing to first_fit"
    )


def test_a_run_that_ends_before_it_has_learned_anything_is_refused_too():
    first_batches = FirstBatches(DataConfig(source="jsonl", path="x", packing="concat", batch_size=4))
    first_batches.check(batch(0), last=False)
    with pytest.raises(ConfigError) as error:
        first_batches.check(batch(0), last=True)
    assert str(error.value) == (
        "data.sequence_length=64 x data.batch_size=4 holds nothing but prompts: no token of the first 2 batches "
        "counts in the loss; raise one of them, or look at what the records have under data.answer_key=answer"
    )


def test_after_one_learned_token_everything_may_come():
    first_batches = FirstBatches(DataConfig())
    for learned in (0, 0, 1, *[0] * (2 * PATIENCE)):
        first_batches.check(batch(learned), last=False)
    first_batches.check(batch(0), last=True)


def test_a_resumed_run_may_end_without_a_learned_token():
    first_batches = FirstBatches(DataConfig(), first_step=3)
    first_batches.check(batch(0), last=True)
