from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.ops.embedding_dot.api import embedding_dot

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


def by_hand(table, indices, vectors):
    out = np.zeros(indices.shape)
    for place in np.ndindex(indices.shape):
        out[place] = np.sum(vectors[place[:-1]] * table[indices[place]])
    return out


def draw(seed, shape, same_row):
    batch, picks, num_rows, num_columns, dtype = shape
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(num_rows, num_columns)), dtype)
    indices = rng.integers(num_rows, size=(*batch, picks))
    if same_row:
        indices[:] = indices.flat[0]
    vectors = jnp.asarray(rng.normal(size=(*batch, num_columns)), jnp.float32)
    return table, jnp.asarray(indices, jnp.int32), vectors


seeds = st.integers(0, 2**32 - 1)


@cache
def compiled(implementation):
    return jax.jit(partial(embedding_dot, implementation=implementation))


def wide(array):
    return np.asarray(array, np.float64)


@every_implementation
@given(seed=seeds, shape=st.sampled_from(SHAPES), same_row=st.booleans())
def test_dot_is_the_inner_product_with_each_picked_row(implementation, seed, shape, same_row):
    table, indices, vectors = draw(seed, shape, same_row)
    out = compiled(implementation)(table, indices, vectors)
    assert out.dtype == jnp.float32
    expected = by_hand(wide(table), np.asarray(indices), wide(vectors))
    magnitude = by_hand(np.abs(wide(table)), np.asarray(indices), np.abs(wide(vectors)))
    assert np.all(np.abs(out - expected) <= 4 * np.finfo(np.float32).eps * table.shape[1] * magnitude)


@every_implementation
@given(seed=seeds)
def test_nan_reaches_only_the_picks_of_its_row(implementation, seed):
    table, indices, vectors = draw(seed, SHAPES[0], same_row=False)
    out = compiled(implementation)(table.at[2, 1].set(jnp.nan), indices, vectors)
    np.testing.assert_array_equal(np.isnan(out), np.asarray(indices) == 2)


def numeric_gradient(function, array, step=1e-5):
    gradient = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        shift = np.zeros(array.shape)
        shift[place] = step
        gradient[place] = (function(array + shift) - function(array - shift)) / (2 * step)
    return gradient


@cache
def compiled_gradient(implementation):
    def loss(table, vectors, indices):
        return jnp.sum(jnp.sin(embedding_dot(table, indices, vectors, implementation=implementation)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@every_precise_implementation
@given(seed=seeds, shape=st.just(SHAPES[0]), same_row=st.booleans())
def test_gradients_equal_finite_differences(implementation, seed, shape, same_row):
    table, indices, vectors = (np.asarray(array) for array in draw(seed, shape, same_row))
    # Short vectors keep the third derivative of the sine, and thus the error of the finite differences, small.
    table, vectors = wide(table), wide(vectors) / 4
    with jax.enable_x64(True):
        d_table, d_vectors = compiled_gradient(implementation)(table, vectors, indices)
    assert d_table.dtype == d_vectors.dtype == np.float64

    def loss(table, vectors):
        return np.sum(np.sin(by_hand(table, indices, vectors)))

    np.testing.assert_allclose(d_table, numeric_gradient(lambda t: loss(t, vectors), table), atol=1e-7)
    np.testing.assert_allclose(d_vectors, numeric_gradient(lambda v: loss(table, v), vectors), atol=1e-7)


@every_implementation
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_every_implementation_agree(implementation, shape):
    table, indices, vectors = draw(3, shape, same_row=False)
    got = compiled_gradient(implementation)(table, vectors, indices)
    expected = compiled_gradient("reference")(table, vectors, indices)
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == other.dtype
        # Sums in another order; the slope of the sine amplifies the errors of sums over many columns.
        scale = np.abs(wide(other)).max() * float(jnp.finfo(table.dtype).eps)
        np.testing.assert_allclose(wide(mine), wide(other), atol=200 * scale, rtol=0)


@every_implementation
def test_vmap_equals_a_loop(implementation):
    table, indices, vectors = draw(0, SHAPES[2], same_row=False)
    dot = compiled(implementation)
    mapped = jax.vmap(dot, in_axes=(None, 0, 0))(table, indices, vectors)
    for number in range(2):
        np.testing.assert_allclose(mapped[number], dot(table, indices[number], vectors[number]), rtol=1e-5)


@every_implementation
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_table_gradient_is_built_only_where_the_table_is_differentiated(implementation, wrap, equations_of):
    table, indices, vectors = jnp.ones((4099, 24)), jnp.zeros((6, 3), jnp.int32), jnp.ones((6, 24))

    def loss(vectors, table):
        return jnp.sum(wrap(partial(embedding_dot, implementation=implementation))(table, indices, vectors) ** 2)

    def writes_rows(argnums):
        return [
            equation
            for equation in equations_of(jax.grad(loss, argnums), vectors, table)
            if "scatter" in equation.primitive and table.shape in equation.shapes
        ]

    assert not writes_rows(0)
    assert writes_rows((0, 1))
    memory = jax.jit(jax.grad(loss)).lower(vectors, table).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < table.nbytes / 4


def test_xla_form_never_holds_every_picked_row(equations_of):
    tokens, picks, columns = 64, 17, 512
    table, vectors = jnp.ones((50, columns)), jnp.ones((tokens, columns))
    indices = jnp.zeros((tokens, picks), jnp.int32)

    def largest(implementation):
        def loss(table, vectors):
            return jnp.sum(embedding_dot(table, indices, vectors, implementation=implementation) ** 2)

        found = equations_of(jax.value_and_grad(loss, argnums=(0, 1)), table, vectors)
        return max(int(np.prod(shape)) for equation in found for shape in equation.shapes)

    assert largest("xla") < tokens * picks * columns
    assert largest("reference") >= tokens * picks * columns


@every_implementation
def test_dots_with_rows_that_do_not_exist_are_nan_and_have_no_gradient(implementation):
    indices, vectors = jnp.array([[0, 3], [-1, 2]]), jnp.ones((2, 4))
    dot = partial(embedding_dot, implementation=implementation)
    np.testing.assert_array_equal(dot(jnp.ones((3, 4)), indices, vectors), [[4, np.nan], [np.nan, 4]])
    loss = lambda table: jnp.nansum(dot(table, indices, vectors))
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((3, 4))), np.array([[1], [0], [1]]) * np.ones(4))
