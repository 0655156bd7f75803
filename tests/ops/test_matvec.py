"""The matrix-vector product equals a sum of products in every implementation, with or without gate and addition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.matvec.api import matvec

every_implementation = pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])


@every_implementation
@pytest.mark.parametrize("gated", [False, True])
# Fewer columns than a kernel program reads at once, and two reads plus a rest; rows that do not fill a program.
@pytest.mark.parametrize(("outputs", "inputs"), [(6, 24), (10, 1500)])
def test_every_output_is_a_row_times_the_vector(implementation, gated, outputs, inputs):
    rng = np.random.default_rng(0)
    x, rows = rng.normal(size=inputs), rng.normal(size=(outputs, inputs)) / inputs**0.5
    expected, residual = rows @ x, None
    if gated:
        gate, up = np.split(expected, 2)
        added = rng.normal(size=outputs // 2)
        expected, residual = gate / (1 + np.exp(-gate)) * up + added, jnp.float32(added)
    found = matvec(jnp.float32(x), jnp.float32(rows), residual, gated=gated, implementation=implementation)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@every_implementation
@pytest.mark.parametrize("gated", [False, True])
def test_biases_are_added_to_the_product_and_gates_multiply_the_vector(implementation, gated):
    rng = np.random.default_rng(0)
    x, input_gate, bias = rng.normal(size=1100), rng.normal(size=1100), rng.normal(size=6)
    rows = rng.normal(size=(6, 1100)) / 30
    expected = rows @ (x * input_gate / (1 + np.exp(-input_gate))) + bias
    if gated:
        gate, up = np.split(expected, 2)
        expected = gate / (1 + np.exp(-gate)) * up
    beside = {"bias": jnp.float32(bias), "input_gate": jnp.float32(input_gate)}
    found = matvec(jnp.float32(x), jnp.float32(rows), **beside, gated=gated, implementation=implementation)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@every_implementation
def test_sixteen_bits_are_summed_in_float32(implementation):
    # Accumulated in float16, the sum would stop at 2048.
    found = matvec(jnp.ones(5000, jnp.float16), jnp.ones((2, 5000), jnp.float16), implementation=implementation)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(found, np.float64), 5000, rtol=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    for x, rows, gated in (((4,), (3, 5), False), ((4,), (3, 4), True), ((2, 4), (3, 4), False)):
        with pytest.raises((ValueError, TypeError), match=r"matvec|shape"):
            jax.eval_shape(lambda x, rows: matvec(x, rows, gated=gated), jnp.zeros(x), jnp.zeros(rows))  # noqa: B023
    with pytest.raises((ValueError, TypeError), match=r"residual|shape"):
        matvec(jnp.zeros(4), jnp.zeros((3, 4)), jnp.zeros(4))
    narrow = jnp.zeros(3, jnp.bfloat16)
    wrong: list[dict[str, Any]] = [{"bias": jnp.zeros(4)}, {"input_gate": jnp.zeros(3)}, {"bias": narrow}]
    for beside in wrong:
        with pytest.raises((ValueError, TypeError), match=rf"{next(iter(beside))}|shape"):
            matvec(jnp.zeros(4), jnp.zeros((3, 4)), **beside)
