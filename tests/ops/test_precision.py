import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.precision import accumulator, init_in_float32


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_sums_are_float32_or_wider(dtype, wide):
    assert accumulator(dtype) == wide
    with jax.numpy_dtype_promotion("strict"):
        assert accumulator(dtype) == wide


def test_16_bit_weights_are_rounded_draws_and_have_their_mean():
    init = jax.nn.initializers.truncated_normal(1.0)
    key, shape = jax.random.key(0), (256, 1024)
    drawn = init_in_float32(init)(key, shape, jnp.bfloat16)
    assert drawn.dtype == jnp.bfloat16
    np.testing.assert_array_equal(drawn, init(key, shape, jnp.float32).astype(jnp.bfloat16))
    assert abs(np.mean(np.asarray(drawn, np.float64))) < 5 / np.sqrt(drawn.size)
