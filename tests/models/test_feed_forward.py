import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.models.feed_forward import FeedForward, fused_linear, linear


def test_output_is_swiglu():
    layer = FeedForward(3, 5, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    gate, up, down = (np.asarray(part.kernel[...], np.float64) for part in (layer.gate, layer.up, layer.down))
    gated = x @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    np.testing.assert_allclose(jax.jit(layer)(x), expected, rtol=1e-5, atol=1e-6)


def test_kernels_are_drawn_from_a_normal_cut_at_three_deviations():
    drawn = linear(64, 512, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    kernel = np.asarray(drawn.kernel[...]) * 8
    assert drawn.bias is None
    # JAX corrects for the smaller deviation of the truncated normal, so the result has the requested one.
    assert 2.5 < np.abs(kernel).max() < 3.1
    np.testing.assert_allclose(kernel.std(), 1, atol=0.02)


@pytest.mark.parametrize("use_bias", [False, True])
def test_layers_side_by_side_give_what_each_gives(use_bias):
    kwargs = {"use_bias": use_bias, "dtype": None, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    layers = [linear(6, outputs, **kwargs) for outputs in (4, 10, 2)]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 6)).astype(np.float32)
    expected = []
    for layer in layers:
        expected.append(x @ np.asarray(layer.kernel[...], np.float64))
        if layer.bias is not None:
            bias = rng.normal(size=layer.bias.shape)
            layer.bias[...] = jnp.asarray(bias, jnp.float32)
            expected[-1] += bias
    assert (layers[0].bias is not None) == use_bias
    for found, wanted in zip(fused_linear(jnp.asarray(x), *layers), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_layers_side_by_side_all_have_a_bias_or_none():
    kwargs = {"dtype": None, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    layers = [linear(6, 4, use_bias=use_bias, **kwargs) for use_bias in (True, False)]
    with pytest.raises(ValueError, match="1 of 2 layers have a bias: all of them must, or none"):
        fused_linear(jnp.ones((2, 6)), *layers)
