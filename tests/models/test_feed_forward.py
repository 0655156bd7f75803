import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.models.feed_forward import FeedForward, linear


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
    # jax divides by the deviation of the cut normal, so that its deviation is the one asked for.
    assert 2.5 < np.abs(kernel).max() < 3.1
    np.testing.assert_allclose(kernel.std(), 1, atol=0.02)
