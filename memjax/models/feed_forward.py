"""The dense feed-forward layer."""

import itertools

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.ops.precision import drawn_wide


def linear(
    inputs: int,
    outputs: int,
    *,
    use_bias: bool = False,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer drawn from a normal of standard deviation inputs ** -0.5, cut at 3 of them; a bias begins at 0."""
    init = drawn_wide(nnx.initializers.truncated_normal(inputs**-0.5, lower=-3.0, upper=3.0))
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    return nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, **kwargs)


def side_by_side(x: Float[Array, "*b inputs"], *layers: nnx.Linear) -> list[Float[Array, "*b outputs"]]:
    """What each of several layers makes of one input, by one matrix product: one gradient of the input, not a sum.

    The layers compute in one type.

    Raises:
        ValueError: some of them have a bias and some have none.
    """
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)):
        raise ValueError(f"{len(biases)} of {len(layers)} layers have a bias: all of them must, or none")
    kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
    bias = jnp.concatenate(biases) if biases else None
    x, kernel, bias = dtypes.promote_dtype((x, kernel, bias), dtype=layers[0].dtype)
    out = x @ kernel
    if bias is not None:
        # Spelled out for those who forbid JAX to promote ranks.
        out += jnp.broadcast_to(bias, out.shape)
    ends = itertools.accumulate(layer.out_features for layer in layers)
    return jnp.split(out, list(ends)[:-1], axis=-1)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv:2002.05202): W2 (silu(W1 x) * W3 x)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = linear(dim, hidden_dim, **kwargs)
        self.up = linear(dim, hidden_dim, **kwargs)
        self.down = linear(hidden_dim, dim, **kwargs)

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        """The layer's output."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))
