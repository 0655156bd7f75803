from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.ops.rms_norm.api import rms_norm

every_implementation = pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
EPSILON = 1e-3
# Batch axes, width, dtype of x; rows that do not fill a program or strip, widths that are not powers of two.
SHAPES = [((5,), 8, "float32"), ((2, 37), 12, "float32"), ((3, 1, 2), 16, "bfloat16"), ((33,), 1, "bfloat16")]

cases = {"seed": st.integers(0, 2**32 - 1), "shape": st.sampled_from(SHAPES), "size": st.sampled_from([1e-3, 1, 1e3])}


def wide(array):
    return np.asarray(array, np.float64)


def draw(seed, shape, size):
    """x, scale, and the cotangents of both results."""
    batch, width, dtype = shape
    rng = np.random.default_rng(seed)
    x, *cotangents = (jnp.asarray(rng.normal(size=(*batch, width)), dtype) for _ in range(3))
    return x * jnp.asarray(size, dtype), jnp.asarray(rng.normal(size=width), jnp.float32), tuple(cotangents)


@cache
def compiled(implementation):
    return jax.jit(partial(rms_norm, epsilon=EPSILON, implementation=implementation))


@cache
def compiled_gradient(implementation):
    def pull(x, scale, cotangents):
        norm = partial(rms_norm, epsilon=EPSILON, implementation=implementation)
        return jax.vjp(lambda *arguments: tuple(norm(*arguments)), x, scale)[1](cotangents)

    return jax.jit(pull)


def rounding(dtype):
    return 8 * float(jnp.finfo(dtype).eps)


@every_implementation
@given(**cases)
def test_rows_have_the_scale_as_their_root_mean_square(implementation, seed, shape, size):
    x, scale, _ = draw(seed, shape, size)
    same, normed = compiled(implementation)(x, scale)
    np.testing.assert_array_equal(same, x)
    expected = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        square = sum(value**2 for value in wide(x)[place]) / x.shape[-1]
        expected[place] = wide(x)[place] / (square + EPSILON) ** 0.5 * wide(scale)
    assert normed.dtype == x.dtype
    np.testing.assert_allclose(wide(normed), expected, rtol=rounding(x.dtype))


@every_implementation
@given(**cases)
def test_gradients_are_those_of_the_jacobian(implementation, seed, shape, size):
    x, scale, (beside, d_y) = draw(seed, shape, size)
    d_x, d_scale = compiled_gradient(implementation)(x, scale, (beside, d_y))
    assert (d_x.dtype, d_scale.dtype) == (x.dtype, scale.dtype)
    width, tolerance = x.shape[-1], rounding(x.dtype)
    expected_x, expected_scale, size_x, size_scale = np.zeros(x.shape), np.zeros(width), np.zeros(x.shape), 0
    for place in np.ndindex(x.shape[:-1]):
        row, up = wide(x)[place], wide(d_y)[place]
        root = (np.mean(row**2) + EPSILON) ** 0.5
        jacobian = np.diag(wide(scale)) @ (np.eye(width) / root - np.outer(row, row) / (width * root**3))
        expected_x[place] = wide(beside)[place] + up @ jacobian
        size_x[place] = np.abs(wide(beside)[place]) + np.abs(up * wide(scale)).max() / root
        expected_scale += up * row / root
        size_scale = size_scale + np.abs(up * row / root)
    assert np.all(np.abs(wide(d_x) - expected_x) <= tolerance * size_x)
    assert np.all(np.abs(wide(d_scale) - expected_scale) <= tolerance * size_scale)


@every_implementation
@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_is_added_first_and_has_the_gradient_of_x(implementation, shape):
    x, scale, cotangents = draw(0, shape, 1)
    residual = draw(1, shape, 1)[0]

    def pull(norm, *arguments):
        return jax.vjp(lambda *arguments: tuple(norm(*arguments)), *arguments)

    norm = partial(rms_norm, epsilon=EPSILON, implementation=implementation)
    found, pulled = pull(lambda x, scale, residual: norm(x, scale, residual=residual), x, scale, residual)
    expected, expected_pulled = pull(norm, x + residual, scale)
    # 16-bit sums may be rounded differently.
    close = partial(np.testing.assert_allclose, rtol=rounding(x.dtype), atol=rounding(x.dtype))
    jax.tree.map(lambda one, other: close(wide(one), wide(other)), found, expected)
    (d_x, d_scale, d_residual), (d_sum, d_scale_of_sum) = pulled(cotangents), expected_pulled(cotangents)
    for gradient, of_sum in ((d_x, d_sum), (d_residual, d_sum), (d_scale, d_scale_of_sum)):
        close(wide(gradient), wide(of_sum))
    np.testing.assert_array_equal(d_x, d_residual)


@every_implementation
def test_vmap_equals_a_loop(implementation):
    x, scale, cotangents = draw(0, ((2, 37), 12, "float32"), 1)
    mapped = jax.vmap(compiled_gradient(implementation), in_axes=(0, None, 0))(x, scale, cotangents)
    for number in range(2):
        one = compiled_gradient(implementation)(x[number], scale, tuple(up[number] for up in cotangents))
        for batched, single in zip(mapped, one, strict=True):
            np.testing.assert_allclose(batched[number], single, rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.asarray([[1.0 + 1e-12, 1.0]])
        assert rms_norm(x, jnp.ones(2), 0.0).normed[0, 0] > 1
        with pytest.raises(NotImplementedError, match=r"rms_norm.*float32"):
            rms_norm(x, jnp.ones(2), 0.0, implementation="triton")
