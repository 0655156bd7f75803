"""The sharded operations of a memory layer equal the plain ones."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from drawn import filled
from memjax.memory import sharded
from memjax.memory.keys import search
from memjax.memory.layer import MemoryLayer
from memjax.memory.peer import PEERLayer
from memjax.memory.read import zero_perturbation
from memjax.memory.table import ValueTable
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, row_step
from memjax.sharding import axes, rules

ROWS, COLUMNS, TOKENS, PICKS = 37, 64, 16, 3
SHAPES = [(2, 4), (8, 1), (1, 8)]
every_mesh = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def make_mesh(shape, axis_type=AxisType.Auto, names=("data", "memory")):
    assert jax.device_count() >= math.prod(shape)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=devices)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    indices = rng.integers(ROWS, size=(TOKENS, PICKS)).astype(np.int32)
    return (
        rng.normal(size=(ROWS, COLUMNS)),
        indices,
        rng.normal(size=(TOKENS, PICKS)),
        rng.normal(size=(TOKENS, COLUMNS)),
    )


def on_mesh_and_alone(shape, function, *arguments):
    """Runs a jitted function with and without a mesh, in x64."""
    with jax.enable_x64(True):
        alone = jax.jit(lambda *arguments: function(*arguments))(*arguments)
        with jax.set_mesh(make_mesh(shape)):
            on_mesh = jax.jit(function)(*arguments)
        return jax.tree.map(np.asarray, (on_mesh, alone))


def assert_equal_trees(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@every_mesh
def test_bag_and_its_gradients_equal_the_plain_ones(shape):
    table, indices, weights, factors = draw()

    def run(table, weights, indices):
        perturbation = zero_perturbation("bag", TOKENS, PICKS, table)

        def loss(table, weights, perturbation):
            out = sharded.bag(table, indices, weights, perturbation)
            return jnp.sum(factors * jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(table, weights, perturbation)

    got, expected = on_mesh_and_alone(shape, run, table, weights, indices)
    assert_equal_trees(got, expected)
    (_, out), (d_table, _, cotangent) = expected
    by_hand = np.stack(
        [sum(w * table[i] for w, i in zip(*row, strict=True)) for row in zip(weights, indices, strict=True)]
    )
    np.testing.assert_allclose(out, by_hand, atol=1e-12)
    np.testing.assert_allclose(cotangent, factors * np.cos(by_hand), atol=1e-12)
    assert np.any(d_table)


@every_mesh
def test_dot_and_its_gradients_equal_the_plain_ones(shape):
    table, indices, factors, vectors = draw()

    def run(table, vectors, indices):
        perturbation = zero_perturbation("dot", TOKENS, PICKS, table)

        def loss(table, vectors, perturbation):
            out, back = sharded.dot(table, indices, vectors, perturbation)
            return jnp.sum(factors * jnp.sin(out)), (out, back)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(table, vectors, perturbation)

    got, expected = on_mesh_and_alone(shape, run, table, vectors, indices)
    assert_equal_trees(got, expected)
    (_, (out, back)), (d_table, d_vectors, cotangent) = expected
    by_hand = np.array([[table[i] @ vector for i in row] for row, vector in zip(indices, vectors, strict=True)])
    np.testing.assert_allclose(out, by_hand, atol=1e-12)
    np.testing.assert_array_equal(back, vectors)
    np.testing.assert_allclose(cotangent, factors * np.cos(by_hand), atol=1e-12)
    np.testing.assert_allclose(d_vectors, np.stack([d @ table[row] for d, row in zip(cotangent, indices, strict=True)]))
    assert np.any(d_table)


@every_mesh
def test_search_and_its_gradients_equal_the_plain_ones(shape):
    rng = np.random.default_rng(1)
    queries, keys = rng.normal(size=(TOKENS, 2, 6)), rng.normal(size=(2, 2, 7, 3))
    factors = rng.normal(size=(TOKENS, 2, 4))

    def run(queries, keys):
        def loss(queries, keys):
            scores, indices = search(queries, keys, 4)
            return jnp.sum(factors * scores), (scores, indices)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(queries, keys)

    assert_equal_trees(*on_mesh_and_alone(shape, run, queries, keys))


RULE = RowRule(state_columns=8, eps=1e-3)


@every_mesh
@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_row_update_equals_the_plain_one(shape, collective):
    # Small pieces and blocks, so that even this small table needs several.
    cut = {"collective": collective, "piece_picks": 4, "block_bytes": 7 * COLUMNS * 8}
    table, *_ = draw()
    picks = [draw(seed)[1:] for seed in (1, 2)]

    def run(table, picks):
        gradients = [RowGradient(*factors) for factors in picks]
        state = RULE.init(ROWS, COLUMNS, table.dtype)
        for number in range(2):
            table, state = sharded.update_rows(table, state, gradients, RULE, row_step(0.1, number), **cut)
        return table, state

    got, expected = on_mesh_and_alone(shape, run, table, picks)
    assert_equal_trees(got, expected)
    assert np.any(expected[0] != table)
    unread = np.setdiff1d(np.arange(ROWS), np.concatenate([indices.ravel() for indices, _, _ in picks]))
    assert unread.size
    np.testing.assert_array_equal(got[0][unread], table[unread])


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_replicas_stay_bit_equal_and_equal_one_device(mesh, collective):
    table = jnp.asarray(draw()[0], jnp.bfloat16)
    gradients = [
        RowGradient(jnp.asarray(indices), jnp.asarray(weights, jnp.float32), jnp.asarray(vectors, jnp.float32))
        for _, indices, weights, vectors in map(draw, range(3))
    ]
    rule = RowRule(kind="sgd")

    def run(table):
        step = jax.jit(
            lambda table, number: sharded.update_rows(
                table, {}, gradients, rule, row_step(1e-3, number), collective=collective
            )[0]
        )
        for number in range(5):
            table = step(table, number)
        return table

    with jax.set_mesh(mesh):
        split = run(jax.device_put(table, NamedSharding(mesh, rules.COLUMNS)))
    replicas = {}
    for shard in split.addressable_shards:
        replicas.setdefault(str(shard.index), []).append(np.asarray(shard.data).tobytes())
    assert [len(copies) for copies in replicas.values()] == [2, 2, 2, 2]
    assert all(len(set(copies)) == 1 for copies in replicas.values())
    alone = np.asarray(run(table))
    assert np.any(alone != np.asarray(table))
    assert not np.any(np.asarray(split) != alone)
    np.testing.assert_allclose(np.asarray(split, float), alone.astype(float), rtol=2**-7)


def collectives(function, *arguments):
    text = str(jax.jit(function).lower(*arguments).compile().as_text())
    names = re.findall(r" (all-gather|all-to-all|all-reduce|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    return sorted(names)


def test_bag_moves_picks_and_bags_and_nothing_else(mesh):
    def place(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    table, indices, weights, _ = draw()
    with jax.set_mesh(mesh):
        arguments = (
            place(table.astype(np.float32), rules.COLUMNS),
            place(indices, rules.TOKENS),
            place(weights.astype(np.float32), rules.TOKENS),
        )
        assert collectives(sharded.bag, *arguments) == ["all-gather", "all-gather", "all-to-all"]


def test_dot_moves_picks_and_vectors_and_dots_and_nothing_else(mesh):
    table, indices, _, vectors = draw()
    with jax.set_mesh(mesh):
        specs = (rules.COLUMNS, rules.TOKENS, rules.TOKENS)
        arrays = (table.astype(np.float32), indices, vectors.astype(np.float32))
        placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
        assert collectives(sharded.dot, *placed) == ["all-gather", "all-to-all", "reduce-scatter"]
        _, back = jax.jit(sharded.dot)(*placed)
        assert back.sharding.is_equivalent_to(NamedSharding(mesh, rules.BAGS), back.ndim)


def test_layers_run_and_are_differentiated_outside_of_jit(mesh):
    table, indices, weights, _ = (jnp.asarray(array) for array in draw())
    expected = sharded.bag(table, indices, weights)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(sharded.bag(table, indices, weights), expected, rtol=1e-5, atol=1e-5)
        gradient = jax.grad(lambda weights: jnp.sum(sharded.bag(table, indices, weights)))(weights)
    np.testing.assert_allclose(gradient, np.asarray(table)[indices].sum(axis=-1), rtol=1e-4, atol=1e-4)


def test_outside_of_jit_a_second_call_compiles_nothing(caplog):
    def step():
        table, indices, weights, vectors = (jnp.asarray(array, array.dtype.kind + "4") for array in draw())
        bags = sharded.bag(table, indices, weights)
        dots, _ = sharded.dot(table, indices, vectors)
        gradient = RowGradient(indices, weights, vectors)
        rule = RowRule(kind="sgd")
        state = rule.init(ROWS, COLUMNS, table.dtype)
        updated, _ = sharded.update_rows(table, state, [gradient], rule, row_step(0.1, 0))
        return bags, dots, updated

    def compiled(devices):
        mesh = jax.make_mesh((2, 2), ("data", "memory"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        caplog.clear()
        with jax.set_mesh(mesh), jax.log_compiles():
            results = step()
            assert all(array.devices() == set(devices) for array in results)
        return [record.args for record in caplog.records if "XLA compilation" in record.msg]

    first, others = jax.devices()[:4], jax.devices()[4:]
    assert compiled(first)
    assert compiled(first) == []
    assert compiled(others), "a mesh of the same sizes on other devices has programs of its own"


def test_without_a_memory_axis_the_operations_are_the_plain_ones():
    table, indices, weights, _ = draw()
    arguments = (jnp.asarray(table, jnp.float32), jnp.asarray(indices), jnp.asarray(weights, jnp.float32))
    expected = np.asarray(sharded.bag(*arguments))
    with jax.set_mesh(make_mesh((8,) + (1,), names=("data", "model"))):
        assert not axes.has_memory_axis()
        assert collectives(sharded.bag, *arguments) == []
        np.testing.assert_array_equal(sharded.bag(*arguments), expected)


class Model(nnx.Module):
    """A user's model."""

    def __init__(self, rngs):
        self.table = ValueTable(25, 64, rngs=rngs)
        self.inputs, self.outputs = (ValueTable(25, 64, rngs=rngs) for _ in range(2))
        sizes = {"num_keys": 5, "num_heads": 2, "top_k": 2, "key_dim": 4, "qk_norm": False, "score_scale": 1.0}
        sizes |= {"rngs": rngs}
        self.layer = MemoryLayer(12, value_dim=64, **sizes)
        self.widen, self.narrow = nnx.Linear(12, 64, rngs=rngs), nnx.Linear(64, 12, rngs=rngs)
        self.experts = PEERLayer(64, **sizes)

    def __call__(self, x):
        x = x + self.layer(x, self.table)
        return x + self.narrow(self.experts(self.widen(x), self.inputs, self.outputs))


def train(place):
    """Outputs and losses of a few steps with a foreign optimizer; `place` shards the batch."""
    model = filled(lambda: Model(nnx.Rngs(0)), std=0.25)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = place(jnp.asarray(np.random.default_rng(1).normal(size=(8, 2, 12)), jnp.float32))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            outputs = model(x)
            return jnp.mean(jnp.sin(outputs)), outputs

        (loss, outputs), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradient)
        return loss, outputs

    steps = [jax.tree.map(np.asarray, step(model, optimizer)) for _ in range(3)]
    losses, outputs = zip(*steps, strict=True)
    return outputs, losses, np.stack([table.rows[...] for table in (model.table, model.inputs, model.outputs)])


@cache
def trained_alone():
    return train(lambda x: x)


@pytest.mark.parametrize(
    ("axis_type", "names", "spec"),
    [
        (AxisType.Explicit, ("data", "memory"), P()),
        pytest.param(AxisType.Explicit, ("data", "memory"), P("data"), marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, ("data", "model"), P("data"), marks=pytest.mark.slow),
        (AxisType.Auto, ("data", "memory"), P(("data", "memory"))),
    ],
    ids=["Explicit, whole batch", "Explicit, split batch", "Explicit without a memory axis", "Auto"],
)
def test_layer_runs_and_trains_under_a_users_mesh(axis_type, names, spec):
    mesh = make_mesh((2, 4), axis_type, names)
    with jax.set_mesh(mesh):
        outputs, losses, rows = train(lambda x: jax.device_put(x, NamedSharding(mesh, spec)))
    expected_outputs, expected_losses, expected_rows = trained_alone()
    np.testing.assert_allclose(outputs, expected_outputs, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 2)], ids=lambda shape: "x".join(map(str, shape)))
def test_the_layout_of_a_projection_over_tensor_is_not_carried_into_the_table(shape):
    mesh, rule = make_mesh(shape, names=("data", "memory", "tensor")), RowRule(kind="sgd")

    def train(table, project, indices, weights, perturbation):
        def loss(weights, perturbation):
            return jnp.sum(jnp.sin(sharded.bag(table, indices, weights, perturbation) @ project))

        d_weights, vectors = jax.grad(loss, (0, 1))(weights, perturbation)
        gradient = RowGradient(indices, weights, vectors)
        return d_weights, sharded.update_rows(table, {}, [gradient], rule, row_step(0.1, 0))[0]

    table, indices, weights, vectors = (
        jnp.asarray(array, jnp.int32 if i == 1 else "float32") for i, array in enumerate(draw())
    )
    split = NamedSharding(mesh, P("tensor"))  # like the projection after a bag, whose inputs are the table's columns
    project = jax.device_put(jnp.ones((COLUMNS, COLUMNS)), split)
    with jax.set_mesh(mesh):
        text = jax.jit(train).lower(table, project, indices, weights, jnp.zeros_like(vectors)).compile().as_text()
    assert text is not None
    collective = r"(\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
    shapes = re.findall(r"= \(?" + collective, text)
    assert shapes
    assert not any(shape.startswith((f"f32[{ROWS},", f"f32[{ROWS * COLUMNS}")) for shape in shapes)
    # The loop over picks must be free of collectives, which would not be ordered with those outside it.
    loops = set(re.findall(r"body=(%\S+?)[,\s]", text))
    inside = [part for part in text.split("\n\n") if part.split(" ")[0] in loops]
    assert loops
    assert not any(re.search(collective, part) for part in inside)
