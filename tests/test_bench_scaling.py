"""The model of communication between many GPUs: its bytes match compiled programs, its times match measurements."""

import importlib
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

from memjax.memory import sharded
from memjax.memory.read import zero_perturbation
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, row_step
from memjax.sharding import rules

BENCH = pathlib.Path(__file__).parents[1] / "experiments/bench"
TINY = """
--model.dim 512 --model.num_heads 8 --model.ffn_dim 64 --model.vocab_size 512 --model.dtype float32
--model.memory.layers 1 --model.num_layers 2 --model.memory.num_keys 16 --model.memory.num_heads 2
--model.memory.top_k 3 --model.memory.key_dim 16 --model.memory.table_dtype float32 --data.sequence_length 8
"""


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("scaling")


def group_size(groups):
    """The group size of a collective, whichever of three notations is used."""
    if groups.startswith("mesh"):  # mesh['data'=2,'memory'=4] {'memory'}
        sizes, axes = groups.split("] ")
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
    counts = re.match(r"\[\d+,(\d+)\]<=", groups)  # [2,4]<=[8]
    return int(counts[1]) if counts else groups.split("}")[0].count(",") + 1  # {{0,1,2,3},{4,5,6,7}}


def received(text):
    """Bytes that a device receives in a compiled program, by kind of collective."""
    found = {}
    kinds, groups = "all-gather|all-to-all|all-reduce|reduce-scatter", r"mesh\[.*?\] \{.*?\}|\S+"
    pattern = rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(.*?replica_groups=({groups})"
    for shapes, kind, groups in re.findall(pattern, text):
        size, group = 0, group_size(groups)
        for name, dims in re.findall(r"(f32|s32|pred)\[([\d,]*)\]", shapes):
            size += {"f32": 4, "s32": 4, "pred": 1}[name] * math.prod(int(dim) for dim in dims.split(",") if dim)
        # The shape is that of the result: one piece for a reduce-scatter, all of it for an all-reduce.
        pieces = {"reduce-scatter": group - 1, "all-reduce": 2 * (1 - 1 / group)}.get(kind, 1 - 1 / group)
        found[kind] = found.get(kind, 0) + size * pieces
    return found


@pytest.mark.parametrize(
    ("shape", "collective"),
    [((2, 4), "all_gather"), ((2, 4), "all_reduce"), ((8, 1), "all_gather"), ((1, 8), "all_gather")],
)
def test_bytes_of_reads_and_updates_are_those_of_the_compiled_program(scaling, shape, collective):
    case = scaling.Case("373m_memory_plus_1m", TINY, sequences=1)
    mesh = jax.make_mesh(shape, ("data", "memory"), axis_types=(AxisType.Auto,) * 2)
    place = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    tokens, picks, width, slots = 8 * case.tokens, case.table.picks, case.table.width, case.table.num_slots
    rule = RowRule(state_columns=64)
    state = jax.eval_shape(lambda: rule.init(slots, width, jnp.float32))
    state = jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype, rules.COLUMNS), state)
    table = place((slots, width), jnp.float32, rules.COLUMNS)
    indices, weights = (place((tokens, picks), dtype, rules.TOKENS) for dtype in (jnp.int32, jnp.float32))
    target = place((tokens, width), jnp.float32, rules.TOKENS)

    def step(table, state, indices, weights, target):
        def loss(weights, perturbation):
            return sharded.bag(table, indices, weights, perturbation) * target

        zero = zero_perturbation("bag", tokens, picks, table)
        out, pull = jax.vjp(loss, weights, zero)
        d_weights, vectors = pull(jnp.ones_like(target))
        # Leaves out padding as a step does.
        gradient = RowGradient(jnp.where(weights > 0, indices, slots - 1), weights, vectors)
        return (
            out,
            d_weights,
            sharded.update_rows(table, state, [gradient], rule, row_step(0.1, 0), collective=collective),
        )

    with jax.set_mesh(mesh):
        found = received(jax.jit(step).lower(table, state, indices, weights, target).compile().as_text())
    expected = case.reads(*shape).link + case.rows(*shape, collective).link
    # XLA may choose to gather weights again before a sum, although the reads have gathered them already.
    again = scaling.Group(shape[1], shape[1]).gather(shape[1] * case.tokens * picks * 4).link
    choices = (expected, expected + again) if collective == "all_reduce" else (expected,)
    assert sum(found.values()) in choices, (found, case.reads(*shape), case.rows(*shape, collective))


@pytest.mark.slow
def test_steps_and_layers_of_two_gpus_are_predicted_within_a_few_percent(scaling):
    rows = list(scaling.check(scaling.measured_rates()))
    assert len(rows) == 5
    for row in rows:
        assert abs(row["error"]) < (0.06 if "layer" in row["case"] else 0.015), row


def test_what_crosses_the_network_is_what_no_gpu_of_the_machine_has(scaling):
    # 16 GPUs on two machines: each ends with 1,600 bytes, half of them from its machine; eight ports share the others.
    assert scaling.Group(16, 8).gather(1600) == (1500, 100)
    assert scaling.Group(16, 8).all_to_all(1600) == (700, 800)
    # If a group has one GPU per machine, each has a port to itself.
    assert scaling.Group(2, 1).gather(1600) == (800, 800)
    assert scaling.Group(8, 8).gather(1600) == (1400, 0)
