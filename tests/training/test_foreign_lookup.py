"""A lookup from outside the package (that of docs/extending.md) needs only a section, a layer and a registry entry."""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from memjax.memory.kinds import KINDS
from memjax.models.counts import training_flops
from memjax.training.plan import memory as memory_plan
from memjax.training.plan.report import describe

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def config(tiny, monkeypatch):
    """The config of a model with the foreign lookup in block 0 and a memory in block 1."""
    section = PAGE.read_text().split("## A kind of lookup\n")[1]
    (code, *_) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {"__name__": __name__}
    monkeypatch.setitem(KINDS, "nearest", None)  # undone after the test
    exec(compile(code, PAGE.name, "exec"), page)
    run = tiny.config("--model.memory.layers 1")
    model = {field.name: getattr(run.model, field.name) for field in dataclasses.fields(run.model)}
    return dataclasses.replace(run, model=page["NearestModelConfig"](**model, nearest=page["NearestConfig"]()))


def test_a_foreign_lookup_trains(config, tiny):
    run = tiny.train(config, tiny.batches(1) * 2)
    assert run.losses[1] < run.losses[0]
    assert set(run.after.tables) == {"shared", "nearest_0"}
    before, after, reads = run.before.tables["nearest_0"], run.after.tables["nearest_0"], run.after.reads["L0"]
    assert reads.sum() == 2 * (tiny.batches(1)[0]["segments"] > 0).sum()
    np.testing.assert_array_equal(np.any(before != after, axis=1), reads > 0)


def test_a_foreign_lookup_is_counted_and_planned(config, tiny):
    program = tiny.program_of(config)
    flops = training_flops(program.parts, 8)
    without = dataclasses.replace(config, model=dataclasses.replace(config.model, nearest=None))
    before = training_flops(tiny.program_of(without).parts, 8)
    dim = config.model.dim
    assert flops.memory_read - before.memory_read == 6 * dim
    assert flops.memory_search - before.memory_search == 6 * dim * 12
    assert flops.feed_forward < before.feed_forward
    assert memory_plan.plan(config, data_axis=1, program=program).total > 0
    assert "12 slots" in describe(config, program.parts, data_axis=1)
    assert config.model.kind(0) == "nearest"
