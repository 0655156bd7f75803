"""The embedding bag, and the embedding dot, its transpose."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot

# Batch axes, picks, rows, columns, dtype of the table.
SHAPES = [
    ((4,), 3, 7, 5, "float32"),
    ((2, 3), 1, 1, 8, "bfloat16"),
    ((2, 1, 3), 6, 3, 12, "float32"),
    ((5,), 4, 33, 16, "bfloat16"),
    # More picks and columns than a kernel program handles at once, and no powers of two.
    ((2,), 20, 9, 200, "float32"),
]


def bag_by_hand(table, indices, weights):
    out = np.zeros((*indices.shape[:-1], table.shape[1]))
    for place in np.ndindex(indices.shape[:-1]):
        for row, weight in zip(indices[place], weights[place], strict=True):
            out[place] += weight * table[row]
    return out


def dot_by_hand(table, indices, vectors):
    out = np.zeros(indices.shape)
    for place in np.ndindex(indices.shape):
        out[place] = np.sum(vectors[place[:-1]] * table[indices[place]])
    return out


class Operation(NamedTuple):
    """An operation on a table, indices, and an operand: the bag's weights, or the dot's vectors."""

    function: Callable[..., Any]
    by_hand: Callable[..., np.ndarray]
    width: Callable[[int, int], int]
    """Width of the operand, from the numbers of picks and columns."""
    summed: Callable[[int, int], int]
    """Number of products in each sum, likewise."""
    rounds: bool
    """Whether the output has the table's dtype, rather than float32."""


OPERATIONS = {
    "bag": Operation(embedding_bag, bag_by_hand, lambda picks, _: picks, lambda picks, _: picks, True),
    "dot": Operation(embedding_dot, dot_by_hand, lambda _, columns: columns, lambda _, columns: columns, False),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_implementation = pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
# Those that support float64.
every_precise_implementation = pytest.mark.parametrize("implementation", ["xla", "reference"])
seeds = st.integers(0, 2**32 - 1)
picked = st.sampled_from(["any rows", "one row for all", "one row per token"])


def draw(name, seed, shape, picks_of="any rows"):
    """Draws table, indices and operand; `picks_of` says which rows are picked."""
    batch, picks, num_rows, num_columns, dtype = shape
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(num_rows, num_columns)), dtype)
    indices = {
        "any rows": lambda: rng.integers(num_rows, size=(*batch, picks)),
        "one row for all": lambda: np.full((*batch, picks), rng.integers(num_rows)),
        "one row per token": lambda: np.broadcast_to(rng.integers(num_rows, size=(*batch, 1)), (*batch, picks)),
    }[picks_of]()
    operand = rng.normal(size=(*batch, OPERATIONS[name].width(picks, num_columns)))
    return table, jnp.asarray(indices, jnp.int32), jnp.asarray(operand, jnp.float32)


@cache
def compiled(name, implementation):
    return jax.jit(partial(OPERATIONS[name].function, implementation=implementation))


@cache
def compiled_gradient(name, implementation):
    def loss(table, operand, indices):
        return jnp.sum(jnp.sin(OPERATIONS[name].function(table, indices, operand, implementation=implementation)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def wide(array):
    return np.asarray(array, np.float64)


@every_operation
@every_implementation
@given(seed=seeds, shape=st.sampled_from(SHAPES), picks_of=picked)
def test_outputs_are_sums_of_products_with_the_picked_rows(name, implementation, seed, shape, picks_of):
    operation, (table, indices, operand) = OPERATIONS[name], draw(name, seed, shape, picks_of)
    out = compiled(name, implementation)(table, indices, operand)
    assert out.dtype == (table.dtype if operation.rounds else jnp.float32)
    expected = operation.by_hand(wide(table), np.asarray(indices), wide(operand))
    magnitude = operation.by_hand(np.abs(wide(table)), np.asarray(indices), np.abs(wide(operand)))
    # The rounding of a float32 sum, and of the cast to the output's dtype.
    sums = 4 * np.finfo(np.float32).eps * operation.summed(indices.shape[-1], table.shape[1]) * magnitude
    cast = float(jnp.finfo(table.dtype).eps) * np.abs(expected) if operation.rounds else 0
    assert np.all(np.abs(wide(out) - expected) <= sums + cast)


@every_implementation
@given(seed=seeds)
def test_nan_reaches_only_the_tokens_that_pick_it(implementation, seed):
    table, indices, weights = draw("bag", seed, SHAPES[0])
    out = compiled("bag", implementation)(table.at[2].set(jnp.nan), indices, weights)
    picked = np.any(np.asarray(indices) == 2, axis=-1)
    np.testing.assert_array_equal(np.isnan(out).all(axis=-1), picked)
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1), picked)


@every_implementation
@given(seed=seeds)
def test_nan_reaches_only_the_picks_of_its_row(implementation, seed):
    table, indices, vectors = draw("dot", seed, SHAPES[0])
    out = compiled("dot", implementation)(table.at[2, 1].set(jnp.nan), indices, vectors)
    np.testing.assert_array_equal(np.isnan(out), np.asarray(indices) == 2)


def numeric_gradient(function, array, step=1e-5):
    gradient = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        shift = np.zeros(array.shape)
        shift[place] = step
        gradient[place] = (function(array + shift) - function(array - shift)) / (2 * step)
    return gradient


@every_operation
@every_precise_implementation
@given(seed=seeds, picks_of=picked)
def test_gradients_equal_finite_differences(name, implementation, seed, picks_of):
    table, indices, operand = (np.asarray(array) for array in draw(name, seed, SHAPES[0], picks_of))
    # Short vectors keep the third derivative of the sine, and thus the error of the finite differences, small.
    table, operand = wide(table), wide(operand) / (4 if name == "dot" else 1)
    with jax.enable_x64(True):
        d_table, d_operand = compiled_gradient(name, implementation)(table, operand, indices)
    assert d_table.dtype == d_operand.dtype == np.float64

    def loss(table, operand):
        return np.sum(np.sin(OPERATIONS[name].by_hand(table, indices, operand)))

    np.testing.assert_allclose(d_table, numeric_gradient(lambda t: loss(t, operand), table), atol=1e-7)
    np.testing.assert_allclose(d_operand, numeric_gradient(lambda o: loss(table, o), operand), atol=1e-7)


@every_operation
@every_implementation
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_every_implementation_agree(name, implementation, shape):
    table, indices, operand = draw(name, 3, shape)
    got = compiled_gradient(name, implementation)(table, operand, indices)
    expected = compiled_gradient(name, "reference")(table, operand, indices)
    # Sums in another order, rounded on the way. The loss is nonlinear in the outputs, whose errors, which grow with the
    # number of products, add to this.
    bound = 8 + operand.shape[-1]
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == other.dtype
        scale = np.abs(wide(other)).max() * float(jnp.finfo(table.dtype).eps)
        np.testing.assert_allclose(wide(mine), wide(other), atol=bound * scale, rtol=0)


@every_operation
@every_implementation
def test_vmap_equals_a_loop(name, implementation):
    table, indices, operand = draw(name, 0, SHAPES[2])
    function = compiled(name, implementation)
    mapped = jax.vmap(function, in_axes=(None, 0, 0))(table, indices, operand)
    tables = jnp.stack([table, 2 * table])
    by_table = jax.vmap(function, in_axes=(0, None, None))(tables, indices, operand)
    rtol = {"bag": 1e-6, "dot": 1e-5}[name]  # a dot has twice as many products, which cancel further
    for number in range(2):
        np.testing.assert_allclose(mapped[number], function(table, indices[number], operand[number]), rtol=rtol)
        np.testing.assert_allclose(by_table[number], function(tables[number], indices, operand), rtol=rtol)


@every_operation
@every_implementation
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_table_gradient_is_built_only_where_the_table_is_differentiated(name, implementation, wrap, equations_of):
    table, indices = jnp.ones((4099, 24)), jnp.zeros((6, 3), jnp.int32)
    function = wrap(partial(OPERATIONS[name].function, implementation=implementation))
    operand = jnp.ones((6, OPERATIONS[name].width(3, 24)))

    def loss(operand, table):
        return jnp.sum(function(table, indices, operand) ** 2)

    def writes_rows(argnums):
        return [
            equation
            for equation in equations_of(jax.grad(loss, argnums), operand, table)
            if "scatter" in equation.primitive and table.shape in equation.shapes
        ]

    assert not writes_rows(0)
    assert writes_rows((0, 1))
    memory = jax.jit(jax.grad(loss)).lower(operand, table).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < table.nbytes / 4


@every_operation
def test_xla_form_never_holds_every_picked_row(name, equations_of):
    tokens, picks, columns = 64, 17, 512
    table, operand = jnp.ones((50, columns)), jnp.ones((tokens, OPERATIONS[name].width(picks, columns)))
    indices = jnp.zeros((tokens, picks), jnp.int32)

    def largest(implementation):
        def loss(table, operand):
            return jnp.sum(OPERATIONS[name].function(table, indices, operand, implementation=implementation) ** 2)

        found = equations_of(jax.value_and_grad(loss, argnums=(0, 1)), table, operand)
        return max(int(np.prod(shape)) for equation in found for shape in equation.shapes)

    assert largest("xla") < tokens * picks * columns
    assert largest("reference") >= tokens * picks * columns


def test_output_is_named_so_that_remat_keeps_it():
    table, indices, weights = draw("bag", 0, SHAPES[0])
    policy = jax.checkpoint_policies.save_only_these_names("memory_bag")

    def loss(weights):
        return jnp.sum(jnp.sin(embedding_bag(table, indices, weights)))

    kept = jax.vjp(jax.checkpoint(loss, policy=policy), weights)[1]
    shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(kept)]
    assert (4, 5) in shapes


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_numpy_arrays_are_accepted(as_users_call, implementation):
    table, indices, weights = np.ones((3, 4), np.float32), np.array([[0, 2]]), np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(
        embedding_bag(table, indices, weights, implementation=implementation),  # pyright: ignore[reportArgumentType]
        [[2, 2, 2, 2]],
    )


@every_implementation
@pytest.mark.parametrize("kind", [jnp.int32, jnp.uint8, jnp.int8])
def test_tokens_with_an_index_outside_the_table_are_nan_and_have_no_gradient(as_users_call, implementation, kind):
    table, weights = jnp.ones((3 if kind == jnp.int32 else 300, 4)), jnp.ones((4, 2))
    indices = jnp.array([[0, 2], [3, 1], [-1, 0], [1, 1]]).astype(kind)
    inside = np.array([True, kind != jnp.int32, kind == jnp.uint8, True])[:, None]
    bag = partial(embedding_bag, implementation=implementation)
    np.testing.assert_array_equal(bag(table, indices, weights), np.where(inside, 2, np.nan) * np.ones(4))
    loss = lambda table, weights: jnp.nansum(bag(table, indices, weights))
    d_table, d_weights = jax.grad(loss, argnums=(0, 1))(table, weights)
    assert d_table.sum() == 2 * 4 * inside.sum()
    np.testing.assert_array_equal(d_weights, np.where(inside, 4, 0) * np.ones(2))


def test_promise_in_bounds_is_accepted_and_other_modes_are_refused(as_users_call):
    table, indices, weights = jnp.ones((3, 4)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))
    np.testing.assert_array_equal(embedding_bag(table, indices, weights, mode="promise_in_bounds"), np.ones((2, 4)))
    unknown: Any = "clip"
    with pytest.raises(ValueError, match="mode='clip' is unknown; known: fill, promise_in_bounds"):
        embedding_bag(table, indices, weights, mode=unknown)


def test_a_bag_inside_a_shard_map_that_is_not_compiled():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    table, indices, weights = jnp.ones((3, 4)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))
    spec = jax.sharding.PartitionSpec("i")
    bag = jax.shard_map(partial(embedding_bag, table), mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_array_equal(bag(indices, weights), np.ones((2, 4)))


@every_implementation
def test_dots_with_rows_that_do_not_exist_are_nan_and_have_no_gradient(implementation):
    indices, vectors = jnp.array([[0, 3], [-1, 2]]), jnp.ones((2, 4))
    dot = partial(embedding_dot, implementation=implementation)
    np.testing.assert_array_equal(dot(jnp.ones((3, 4)), indices, vectors), [[4, np.nan], [np.nan, 4]])
    loss = lambda table: jnp.nansum(dot(table, indices, vectors))
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((3, 4))), np.array([[1], [0], [1]]) * np.ones(4))
