from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.ops.grouped_matmul.api import grouped_matmul

every_implementation = pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])

# Rows, groups, columns of the rows, columns of the matrices; the second spans several tiles in every dimension.
SHAPES = [(12, 3, 5, 7), (150, 4, 70, 80), (3, 1, 1, 16), (8, 5, 16, 3)]


def by_hand(rows, matrices, sizes):
    """The products, one row at a time, and the gradients of sum(sin(product))."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    out, d_rows, d_matrices = np.zeros((len(rows), matrices.shape[2])), np.zeros(rows.shape), np.zeros(matrices.shape)
    for row, number in enumerate(group):
        out[row] = rows[row] @ matrices[number]
        slope = np.cos(out[row])
        d_rows[row] = matrices[number] @ slope
        d_matrices[number] += np.outer(rows[row], slope)
    return out, d_rows, d_matrices


def draw(seed, shape, load, dtype="float32"):
    num_rows, groups, inputs, outputs = shape
    rng = np.random.default_rng(seed)
    sizes = {
        "even": lambda: np.bincount(np.arange(num_rows) % groups, minlength=groups),
        "any": lambda: rng.multinomial(num_rows, rng.dirichlet(np.ones(groups))),
        "all in one": lambda: num_rows * (np.arange(groups) == rng.integers(groups)),
    }[load]()
    rows, matrices = rng.normal(size=(num_rows, inputs)), rng.normal(size=(groups, inputs, outputs)) / inputs
    return jnp.asarray(rows, dtype), jnp.asarray(matrices, dtype), jnp.asarray(sizes, jnp.int32)


@cache
def compiled(implementation):
    def run(rows, matrices, sizes):
        out, pull = jax.vjp(partial(grouped_matmul, sizes=sizes, implementation=implementation), rows, matrices)
        return out, *pull(jnp.cos(out))

    return jax.jit(run)


cases = {
    "seed": st.integers(0, 2**32 - 1),
    "shape": st.sampled_from(SHAPES),
    "load": st.sampled_from(["even", "any", "all in one"]),
}


@every_implementation
@given(**cases)
def test_products_and_gradients_are_those_of_each_rows_own_matrix(implementation, seed, shape, load):
    rows, matrices, sizes = draw(seed, shape, load)
    got = compiled(implementation)(rows, matrices, sizes)
    expected = by_hand(np.asarray(rows, np.float64), np.asarray(matrices, np.float64), np.asarray(sizes))
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == jnp.float32
        # Float32 sums of at most 150 products.
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=150 * 2**-23 * np.abs(other).max(initial=1e-30))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("load", ["any", "all in one"])
def test_in_float64_all_digits_agree(implementation, load):
    with jax.enable_x64(True):
        rows, matrices, sizes = draw(1, SHAPES[0], load, "float64")
        got = compiled(implementation)(rows, matrices, sizes)
    for mine, other in zip(got, by_hand(*map(np.asarray, (rows, matrices, sizes))), strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sixteen_bit_factors_are_summed_in_float32(implementation):
    # 1 + 255 * 2**-9 stays 1 if the sum is accumulated in bfloat16.
    rows = jnp.asarray([[1.0] + [2.0**-9] * 255] * 2, jnp.bfloat16)
    matrices = jnp.ones((2, 256, 1), jnp.bfloat16)
    out = compiled(implementation)(rows, matrices, jnp.asarray([1, 1], jnp.int32))[0]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.full((2, 1), jnp.bfloat16(1 + 255 * 2.0**-9)))


@every_implementation
def test_a_nan_stays_in_its_own_group(implementation):
    rows, matrices, _ = draw(0, SHAPES[0], "even")
    sizes = jnp.asarray([5, 0, 7], jnp.int32)
    out, d_rows, d_matrices = compiled(implementation)(rows.at[5].set(jnp.nan), matrices, sizes)
    np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(12) == 5)
    np.testing.assert_array_equal(np.isnan(d_rows).any(axis=1), np.arange(12) == 5)
    np.testing.assert_array_equal(np.isnan(d_matrices).any(axis=(1, 2)), [False, False, True])


@every_implementation
def test_vmap_equals_a_loop(implementation):
    first, second = (draw(seed, SHAPES[3], "any") for seed in (1, 2))
    product = partial(grouped_matmul, implementation=implementation)
    mapped = jax.jit(jax.vmap(product))(*(jnp.stack(pair) for pair in zip(first, second, strict=True)))
    for number, arguments in enumerate((first, second)):
        rows, matrices, sizes = arguments
        np.testing.assert_allclose(mapped[number], product(rows, matrices, sizes), rtol=1e-5, atol=1e-6)


def test_mismatched_arguments_are_refused():
    rows, matrices, sizes = draw(0, SHAPES[0], "even")
    with pytest.raises(ValueError, match=r"found rows float32\[12, 4\], matrices float32\[3, 5, 7\]"):
        grouped_matmul(rows[:, 1:], matrices, sizes)
    with pytest.raises(ValueError, match=r"found rows bfloat16\[12, 5\], matrices float32"):
        grouped_matmul(rows.astype(jnp.bfloat16), matrices, sizes)
    with pytest.raises(ValueError, match=r"found .* matrices float32\[3, 5, 7\], sizes int32\[2\]"):
        grouped_matmul(rows, matrices, sizes[1:])


@pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
def test_sizes_beyond_the_rows_reach_no_row_that_does_not_exist(implementation):
    rows, matrices, sizes = jnp.ones((5, 8)), jnp.ones((3, 8, 8)), jnp.array([3, 90, 7])
    product = partial(grouped_matmul, implementation=implementation)
    np.testing.assert_array_equal(product(rows, matrices, sizes), np.full((5, 8), 8))
    gradient = jax.grad(lambda matrices: product(rows, matrices, sizes).sum())(matrices)
    np.testing.assert_array_equal(gradient, np.array([3, 2, 0])[:, None, None] * np.ones((8, 8)))
