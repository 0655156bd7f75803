import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.models.norm import RMSNorm


def run(implementation, x):
    """The norm, and the gradients of a loss that also uses the norm's input."""
    norm = RMSNorm(8, epsilon=1e-5, dtype=None, param_dtype=jnp.float32, implementation=implementation)
    graphdef, params = nnx.split(norm)

    @jax.jit
    def loss(params, x):
        same, normed = nnx.merge(graphdef, params)(x)
        return jnp.sum(jnp.sin(same) + normed**3), normed

    (_, normed), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return jax.tree.leaves((normed, gradients))


def test_rows_have_unit_mean_square_and_the_requested_type():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)) * 7, jnp.float32)
    norm = RMSNorm(8, epsilon=0.0, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    same, normed = norm(x)
    assert same.dtype == normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.mean(np.asarray(normed, np.float64) ** 2, axis=-1), 1, rtol=2e-2)


# Triton's interpreter can serve one device at a time.
@pytest.mark.parametrize(("implementation", "shape"), [("triton", (1, 1)), ("xla", (2, 4))])
def test_on_a_mesh_every_device_norms_its_own_tokens(implementation, shape):
    devices = jax.devices()[: shape[0] * shape[1]]
    axes = {"axis_types": (jax.sharding.AxisType.Auto,) * 2, "devices": devices}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 8)), jnp.float32)
    expected = run("xla", x)
    with jax.set_mesh(jax.make_mesh(shape, ("data", "memory"), **axes)):
        got = run(implementation, x)
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
