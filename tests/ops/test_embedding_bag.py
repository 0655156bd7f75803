from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.ops.embedding_bag.api import embedding_bag

every_implementation = pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
# Those that support float64.
every_precise_implementation = pytest.mark.parametrize("implementation", ["xla", "reference"])

# Batch axes, picks, rows, columns, dtype of the table.
SHAPES = [
    ((4,), 3, 7, 5, "float32"),
    ((2, 3), 1, 1, 8, "bfloat16"),
    ((2, 1, 3), 6, 3, 12, "float32"),
    ((5,), 4, 33, 16, "bfloat16"),
    # More picks and columns than a kernel program handles at once, and no powers of two.
    ((2,), 20, 9, 200, "float32"),
]


def by_hand(table, indices, weights):
    out = np.zeros((*indices.shape[:-1], table.shape[1]))
    for place in np.ndindex(indices.shape[:-1]):
        for row, weight in zip(indices[place], weights[place], strict=True):
            out[place] += weight * table[row]
    return out


def draw(seed, shape, picks_of):
    """Draws table, indices and weights; `picks_of` says which rows are picked."""
    batch, picks, num_rows, num_columns, dtype = shape
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(num_rows, num_columns)), dtype)
    indices = {
        "any rows": lambda: rng.integers(num_rows, size=(*batch, picks)),
        "one row for all": lambda: np.full((*batch, picks), rng.integers(num_rows)),
        "one row per token": lambda: np.broadcast_to(rng.integers(num_rows, size=(*batch, 1)), (*batch, picks)),
    }[picks_of]()
    weights = jnp.asarray(rng.normal(size=(*batch, picks)), jnp.float32)
    return table, jnp.asarray(indices, jnp.int32), weights


seeds = st.integers(0, 2**32 - 1)
cases = {
    "seed": seeds,
    "shape": st.sampled_from(SHAPES),
    "picks_of": st.sampled_from(["any rows", "one row for all", "one row per token"]),
}


@cache
def compiled(implementation):
    return jax.jit(partial(embedding_bag, implementation=implementation))


def wide(array):
    return np.asarray(array, np.float64)


def assert_close(got, table, indices, weights):
    """The error is bounded by the rounding of a float32 sum over the picks and of the cast to the table's dtype."""
    expected = by_hand(wide(table), np.asarray(indices), wide(weights))
    magnitude = by_hand(np.abs(wide(table)), np.asarray(indices), np.abs(wide(weights)))
    sums = 4 * np.finfo(np.float32).eps * indices.shape[-1] * magnitude
    assert np.all(np.abs(wide(got) - expected) <= sums + float(jnp.finfo(table.dtype).eps) * np.abs(expected))


@every_implementation
@given(**cases)
def test_bag_is_the_weighted_sum_of_the_picked_rows(implementation, seed, shape, picks_of):
    table, indices, weights = draw(seed, shape, picks_of)
    out = compiled(implementation)(table, indices, weights)
    assert out.dtype == table.dtype
    assert_close(out, table, indices, weights)


@every_implementation
@given(seed=seeds)
def test_nan_reaches_only_the_tokens_that_pick_it(implementation, seed):
    table, indices, weights = draw(seed, SHAPES[0], "any rows")
    out = compiled(implementation)(table.at[2].set(jnp.nan), indices, weights)
    picked = np.any(np.asarray(indices) == 2, axis=-1)
    np.testing.assert_array_equal(np.isnan(out).all(axis=-1), picked)
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1), picked)


def numeric_gradient(function, array, step=1e-5):
    gradient = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        shift = np.zeros(array.shape)
        shift[place] = step
        gradient[place] = (function(array + shift) - function(array - shift)) / (2 * step)
    return gradient


@cache
def compiled_gradient(implementation):
    def loss(table, weights, indices):
        return jnp.sum(jnp.sin(embedding_bag(table, indices, weights, implementation=implementation)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@every_precise_implementation
@given(seed=seeds, shape=st.just(SHAPES[0]), picks_of=cases["picks_of"])
def test_gradients_equal_finite_differences(implementation, seed, shape, picks_of):
    table, indices, weights = (np.asarray(array) for array in draw(seed, shape, picks_of))
    table, weights = wide(table), wide(weights)
    with jax.enable_x64(True):
        d_table, d_weights = compiled_gradient(implementation)(table, weights, indices)
    assert d_table.dtype == d_weights.dtype == np.float64

    def loss(table, weights):
        return np.sum(np.sin(by_hand(table, indices, weights)))

    np.testing.assert_allclose(d_table, numeric_gradient(lambda t: loss(t, weights), table), atol=1e-7)
    np.testing.assert_allclose(d_weights, numeric_gradient(lambda w: loss(table, w), weights), atol=1e-7)


@every_implementation
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_every_implementation_agree(implementation, shape):
    table, indices, weights = draw(3, shape, "any rows")
    got = compiled_gradient(implementation)(table, weights, indices)
    expected = compiled_gradient("reference")(table, weights, indices)
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == other.dtype
        # Sums in another order, rounded to the table's dtype on the way. The loss is nonlinear in the bags, so their
        # errors, which grow with the number of picks, add to this.
        scale = np.abs(wide(other)).max() * float(jnp.finfo(table.dtype).eps)
        np.testing.assert_allclose(wide(mine), wide(other), atol=(8 + indices.shape[-1]) * scale, rtol=0)


@every_implementation
def test_vmap_equals_a_loop(implementation):
    table, indices, weights = draw(0, SHAPES[2], "any rows")
    bag = compiled(implementation)
    mapped = jax.vmap(bag, in_axes=(None, 0, 0))(table, indices, weights)
    tables = jnp.stack([table, 2 * table])
    by_table = jax.vmap(bag, in_axes=(0, None, None))(tables, indices, weights)
    for number in range(2):
        np.testing.assert_allclose(mapped[number], bag(table, indices[number], weights[number]), rtol=1e-6)
        np.testing.assert_allclose(by_table[number], bag(tables[number], indices, weights), rtol=1e-6)


@every_implementation
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_table_gradient_is_built_only_where_the_table_is_differentiated(implementation, wrap, equations_of):
    table, indices, weights = jnp.ones((4099, 24)), jnp.zeros((6, 3), jnp.int32), jnp.ones((6, 3))

    def loss(weights, table):
        return jnp.sum(wrap(partial(embedding_bag, implementation=implementation))(table, indices, weights) ** 2)

    def writes_rows(argnums):
        return [
            equation
            for equation in equations_of(jax.grad(loss, argnums), weights, table)
            if "scatter" in equation.primitive and table.shape in equation.shapes
        ]

    assert not writes_rows(0)
    assert writes_rows((0, 1))

    def temporary(argnums):
        memory = jax.jit(jax.grad(loss, argnums)).lower(weights, table).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary(0) < table.nbytes / 4


def test_xla_form_never_holds_every_picked_row(equations_of):
    tokens, picks, columns = 64, 17, 512
    table, weights = jnp.ones((50, columns)), jnp.ones((tokens, picks))
    indices = jnp.zeros((tokens, picks), jnp.int32)

    def largest(implementation):
        def loss(table, weights):
            return jnp.sum(embedding_bag(table, indices, weights, implementation=implementation) ** 2)

        found = equations_of(jax.value_and_grad(loss, argnums=(0, 1)), table, weights)
        return max(int(np.prod(shape)) for equation in found for shape in equation.shapes)

    assert largest("xla") < tokens * picks * columns
    assert largest("reference") >= tokens * picks * columns


def test_output_is_named_so_that_remat_keeps_it():
    table, indices, weights = draw(0, SHAPES[0], "any rows")
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
