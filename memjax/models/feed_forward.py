"""The dense feed-forward layer."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.ops.precision import init_in_float32
from memjax.sharding.axes import tensor_pieces
from memjax.sharding.rules import named


def linear(
    inputs: int,
    outputs: int,
    *,
    use_bias: bool = False,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    axes: tuple[str | None, str | None] = (None, None),
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer drawn from a normal of standard deviation inputs ** -0.5, truncated at 3 of them; biases are 0.

    `axes` are the logical names of inputs and outputs (`sharding.rules`).
    """
    init = init_in_float32(nnx.initializers.truncated_normal(inputs**-0.5, lower=-3.0, upper=3.0))
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    metadata = {"kernel_metadata": named(*axes), "bias_metadata": named(axes[1])}
    return nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, **metadata, **kwargs)


def fused_linear(x: Float[Array, "*b inputs"], *layers: nnx.Linear) -> list[Float[Array, "*b outputs"]]:
    """Outputs of several layers for one input by a single matrix product, so that the input has a single gradient.

    All layers compute in the type of the first. If the mesh shards their outputs, each device's shards are joined, so
    that no output moves between devices.

    Raises:
        ValueError: some of them have a bias and some have none.
    """
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)):
        raise ValueError(f"{len(biases)} of {len(layers)} layers have a bias: all of them must, or none")
    widths = [layer.out_features for layer in layers]
    count = min(tensor_pieces(layer.kernel) for layer in layers)
    kernel = _join([layer.kernel[...] for layer in layers], count)
    bias = _join(biases, count) if biases else None
    x, kernel, bias = dtypes.promote_dtype((x, kernel, bias), dtype=layers[0].dtype)
    out = x @ kernel
    if bias is not None:
        # Explicit, because jax_numpy_rank_promotion may be `raise`.
        out += jnp.broadcast_to(bias, out.shape)
    ends = itertools.accumulate(width // count for width in widths)
    parts = jnp.split(_cut(out, count), list(ends)[:-1], axis=-1)
    return parts if count == 1 else [part.reshape(*x.shape[:-1], -1) for part in parts]


def _cut(array: Float[Array, "*b n"], count: int) -> Array:
    """Splits the last axis into `count` equal pieces."""
    return array if count == 1 else array.reshape(*array.shape[:-1], count, -1)


def _join(arrays: Sequence[Float[Array, "*b _"]], count: int) -> Float[Array, "*b n"]:
    """Joins the first of `count` pieces of each array, then the second of each, and so on."""
    joined = jnp.concatenate([_cut(array, count) for array in arrays], axis=-1)
    return joined.reshape(*arrays[0].shape[:-1], -1)


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
        self.gate = linear(dim, hidden_dim, axes=("embed", "ffn"), **kwargs)
        self.up = linear(dim, hidden_dim, axes=("embed", "ffn"), **kwargs)
        self.down = linear(hidden_dim, dim, axes=("ffn", "embed"), **kwargs)

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        if tensor_pieces(self.gate.kernel) == 1:
            gate, up = self.gate(x), self.up(x)
        else:
            # The input's gradient is summed over devices; that of one product is half as much traffic as those of two.
            gate, up = fused_linear(x, self.gate, self.up)
        return self.down(nnx.silu(gate) * up)
