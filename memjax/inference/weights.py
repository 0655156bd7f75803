"""A model's weights as decoding reads them: projections of one input joined, matrices in the type of the activations.

A decoding step is bound by reading weights, so each matrix is read once, by as few products as there are inputs.
Matrices of blocks are stored as [outputs, inputs]: XLA for GPUs turns the product of a single row into a reduction, and
a reduction along rows is one kernel at the pace of the memory, while one along columns takes several times as long. The
model computes with the same casts, so only the order of sums differs.
"""

import operator
import weakref
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.memory.table import TableRows
from memjax.models.attention import Attention
from memjax.models.decoder import Decoder, resolve_dtype
from memjax.models.feed_forward import FeedForward


class JoinedAttention(Attention):
    """Attention whose three projections are one matrix."""

    def __init__(self, attention: Attention):
        """Takes over the parameters of an attention layer."""
        for name, value in vars(attention).items():
            if name not in ("query", "key", "value", "out") and not name.startswith("_"):
                setattr(self, name, value)
        self.joined = Joined(attention.query, attention.key, attention.value)
        self.out = Joined(attention.out)

    def query_key_value(self, x: Float[Array, "b s dim"]) -> list[Float[Array, "b s width"]]:
        """The three projections, by one product."""
        return self.joined.split(x)


class JoinedFeedForward(FeedForward):
    """SwiGLU whose two inner projections are one matrix."""

    def __init__(self, feed_forward: FeedForward):
        """Takes over the parameters of a feed-forward layer."""
        self.joined = Joined(feed_forward.gate, feed_forward.up)
        self.down = Joined(feed_forward.down)

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        """The layer's output."""
        gate, up = self.joined.split(x)
        return self.down(nnx.silu(gate) * up)


class Joined(nnx.Module):
    """Linear layers that read the same input, or a single one, stored as one matrix with a row for each output."""

    def __init__(self, *layers: nnx.Linear):
        """Joins the layers' matrices; all of them have a bias, or none."""
        self.ends = tuple(sum(layer.out_features for layer in layers[: count + 1]) for count in range(len(layers) - 1))
        self.dtype = layers[0].dtype
        self.rows = nnx.Param(jnp.concatenate([layer.kernel[...].T for layer in layers]))
        biases = [layer.bias[...] for layer in layers if layer.bias is not None]
        self.bias = nnx.Param(jnp.concatenate(biases)) if biases else None

    def __call__(self, x: Float[Array, "*b inputs"]) -> Float[Array, "*b outputs"]:
        """What the layers make of x, side by side."""
        rows, bias = self.rows[...], None if self.bias is None else self.bias[...]
        x, rows, bias = promote_dtype((x, rows, bias), dtype=self.dtype)
        out = jax.lax.dot_general(x, rows, (((x.ndim - 1,), (1,)), ((), ())))
        if bias is not None:
            out += jnp.broadcast_to(bias, out.shape)
        return out

    def split(self, x: Float[Array, "*b inputs"]) -> list[Float[Array, "*b outputs"]]:
        """What each layer makes of x."""
        return jnp.split(self(x), self.ends, axis=-1)


def prepare(model: Decoder) -> Decoder:
    """The model with joined projections, and with matrices in the type that it computes in where that is narrower.

    Arrays that stay as they are, tables among them, are the model's own and take no more memory. What was made is kept
    as long as the model lives and has the same arrays.
    """
    graphdef, tables, params = nnx.split(model, TableRows, ...)
    arrays = jax.tree.leaves((tables, params))
    known = _prepared.get(model)
    if known is not None and len(known[0]) == len(arrays) and all(map(operator.is_, known[0], arrays)):
        return known[1]
    dtype = resolve_dtype(model.config.dtype)
    # Narrowed first: of what is joined there are two copies for a moment.
    joined = nnx.merge(graphdef, tables, jax.tree.map(partial(_narrowed, dtype=dtype), params))
    for block in joined.blocks:
        block.attention = JoinedAttention(block.attention)
        if block.feed_forward is not None:
            block.feed_forward = JoinedFeedForward(block.feed_forward)
    _prepared[model] = (arrays, joined)
    return joined


_prepared: weakref.WeakKeyDictionary[Decoder, tuple[list[Array], Decoder]] = weakref.WeakKeyDictionary()


def _narrowed(weight: Array, *, dtype: DTypeLike) -> Array:
    """A matrix in a type; vectors (norms, biases) are used in the type in which they are kept."""
    return weight.astype(dtype) if weight.ndim >= 2 and jnp.dtype(dtype).itemsize < weight.dtype.itemsize else weight
