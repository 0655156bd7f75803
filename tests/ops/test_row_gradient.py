import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.ops.row_gradient import RowGradient


def by_hand(num_rows, indices, weights, vectors):
    gradient = np.zeros((num_rows, vectors.shape[1]))
    for token, pick in np.ndindex(indices.shape):
        gradient[indices[token, pick]] += weights[token, pick] * vectors[token]
    return gradient


dense = jax.jit(RowGradient.dense, static_argnums=1)


@given(seed=st.integers(0, 2**32 - 1), hot=st.booleans(), shape=st.sampled_from([(1, 1, 4), (6, 3, 5), (4, 8, 3)]))
def test_dense_gradient_adds_up_every_pick_of_a_row(seed, hot, shape):
    tokens, picks, columns = shape
    rng = np.random.default_rng(seed)
    indices = np.full((tokens, picks), 4) if hot else rng.integers(9, size=(tokens, picks))
    weights, vectors = rng.normal(size=(tokens, picks)), rng.normal(size=(tokens, columns))
    with jax.enable_x64(True):
        got = dense(RowGradient(jnp.asarray(indices), jnp.asarray(weights), jnp.asarray(vectors)), 9)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, by_hand(9, indices, weights, vectors), atol=1e-13)


def test_factors_in_bfloat16_are_summed_in_float32():
    ones = jnp.ones((300, 1), jnp.bfloat16)
    gradient = RowGradient(jnp.zeros((300, 1), jnp.int32), ones, ones).dense(2)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, [[300], [0]])


def test_picks_of_rows_that_do_not_exist_add_nothing_to_the_dense_gradient():
    gradient = RowGradient(jnp.array([[-1, 1, 2]], jnp.int8), jnp.ones((1, 3)), jnp.ones((1, 1))).dense(2)
    np.testing.assert_array_equal(gradient, [[0], [1]])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_padding_is_left_out_whatever_the_type_of_indices(dtype):
    rows = 300 if "8" in dtype else 2**16 + 1
    gradient = RowGradient(jnp.array([[1], [44]], dtype), jnp.ones((2, 1)), jnp.ones((2, 1)))
    found = gradient.without_padding(jnp.array([True, False]), rows).dense(rows)
    np.testing.assert_array_equal(np.flatnonzero(found), [1])


def test_flags_of_padding_are_as_many_as_the_tokens():
    gradient = RowGradient(jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2)), jnp.ones((3, 1)))
    with pytest.raises(
        ValueError, match=r"every token needs one flag; found token_mask bool\[1\], indices int32\[3, 2\]"
    ):
        gradient.without_padding(jnp.ones(1, bool), 9)
