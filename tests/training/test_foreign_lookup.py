"""A kind of lookup from outside the package: its section, its layer and an entry in the registry are all it takes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from memjax.config.dtype import DType
from memjax.config.memory import LookupConfig
from memjax.config.model import ModelConfig
from memjax.memory import sharded
from memjax.memory.kinds import KINDS, LookupKind, TokenBytes
from memjax.memory.lookup import LookupLayer
from memjax.memory.read import TableRead
from memjax.models.counts import training_flops
from memjax.sharding.axes import fold, unfold
from memjax.training.plan import memory as memory_plan
from memjax.training.plan.report import describe


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NearestConfig(LookupConfig):
    """Each token reads the row of the key that it is most like."""

    layers: tuple[int, ...] = (0,)
    value_init_scale: float = 1.0
    table_dtype: DType = "auto"
    num_keys: int = 12

    @property
    def num_slots(self) -> int:
        return self.num_keys

    @property
    def picks(self) -> int:
        return 1

    def tables(self, layer: int) -> tuple[str, ...]:
        return (f"nearest_{layer}",)


class Nearest(LookupLayer):
    READS = ("bag",)
    picks = 1

    def __init__(self, dim, config, *, dtype, param_dtype, implementation, rngs):
        self.num_slots, self.implementation = config.num_slots, implementation
        self.keys = nnx.Linear(dim, config.num_slots, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def with_reads(self, x, *tables, perturbations=None):
        (table,), (perturbation,) = tables, perturbations or (None,)
        weights, indices = jax.lax.top_k(jax.nn.softmax(self.keys(fold(x))), 1)
        rows = table.rows_for(self.num_slots, x.shape[-1])
        bag = sharded.bag(rows, indices, weights, perturbation, implementation=self.implementation)
        return unfold(bag, x).astype(x.dtype), (TableRead.bag(table, indices, weights),)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForeignModelConfig(ModelConfig):
    nearest: NearestConfig | None = None


@pytest.fixture
def config(tiny, monkeypatch):
    """A run of a model that has a memory in block 1 and the foreign lookup in block 0."""
    bytes_of = lambda section, dim, width, table_width: TokenBytes(0, 0, 12 + dim * table_width, 8, 12)
    kind = LookupKind(NearestConfig, Nearest, "nearest    {:,} keys", "nearest keys", lambda section: 0, bytes_of)
    monkeypatch.setitem(KINDS, "nearest", kind)
    run = tiny.config("--model.memory.layers 1")
    model = {field.name: getattr(run.model, field.name) for field in dataclasses.fields(run.model)}
    return dataclasses.replace(run, model=ForeignModelConfig(**model, nearest=NearestConfig()))


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
