"""A model's weights as decoding reads them: projections of one input joined, matrices in the type of the activations.

A decoding step is bound by reading weights, so each matrix is read once, by as few products as there are inputs.
Matrices of blocks are stored as [outputs, inputs], so that the product of a single row is a reduction along rows of the
matrix: one kernel at the pace of the memory. Along columns XLA for GPUs takes several times as long. The model computes
with the same casts, so only the order of sums differs.
"""

import operator
import weakref
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.memory.table import TableRows, ValueTable
from memjax.models.attention import Attention, KeyValues
from memjax.models.block import Block
from memjax.models.decoder import Decoder, resolve_dtype
from memjax.models.feed_forward import FeedForward
from memjax.ops import dispatch
from memjax.ops.matvec.api import matvec
from memjax.sharding.axes import has_several_devices, on_own_tokens


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

    def _project_out(
        self, out: Float[Array, "b s n h"], residual: Float[Array, "b s dim"] | None = None
    ) -> Float[Array, "b s dim"]:
        return self.out(out.reshape(*out.shape[:2], -1), residual)


class JoinedFeedForward(FeedForward):
    """SwiGLU whose two inner projections are one matrix."""

    def __init__(self, feed_forward: FeedForward):
        """Takes over the parameters of a feed-forward layer."""
        self.joined = Joined(feed_forward.gate, feed_forward.up)
        self.down = Joined(feed_forward.down)

    def __call__(
        self, x: Float[Array, "*b dim"], residual: Float[Array, "*b dim"] | None = None
    ) -> Float[Array, "*b dim"]:
        """The layer's output, added to a residual."""
        return self.down(self.joined.gated(x), residual)


class JoinedBlock(Block):
    """A block with joined projections, whose products add to the residual stream themselves."""

    def __init__(self, block: Block):
        """Takes over the parameters of a block."""
        for name, value in vars(block).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.attention = JoinedAttention(block.attention)
        if block.feed_forward is not None:
            self.feed_forward = JoinedFeedForward(block.feed_forward)

    def with_cache(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        cache: KeyValues | None,
        tables: tuple[ValueTable, ...] = (),
    ) -> tuple[Float[Array, "b s dim"], KeyValues]:
        """`Block.with_cache`."""
        if self.norm_placement == "post":  # what products give is normed before it is added
            return super().with_cache(x, positions, cache, tables)
        x, inputs = self.attention_norm(x)
        x, cache = self.attention.with_cache(inputs, positions, cache, x)
        is_dense = self.experts is None and self.lookup is None
        if not is_dense or not isinstance(self.feed_forward, JoinedFeedForward):
            return self._mix(x, tables)[0], cache
        x, inputs = self.mixer_norm(x)
        return self.feed_forward(inputs, x), cache


class Joined(nnx.Module):
    """Linear layers that read the same input, or a single one, stored as one matrix with a row for each output."""

    def __init__(self, *layers: nnx.Linear):
        """Joins the layers' matrices; all of them have a bias, or none."""
        self.ends = tuple(sum(layer.out_features for layer in layers[: count + 1]) for count in range(len(layers) - 1))
        self.dtype = layers[0].dtype
        self.rows = nnx.Param(jnp.concatenate([layer.kernel[...].T for layer in layers]))
        biases = [layer.bias[...] for layer in layers if layer.bias is not None]
        self.bias = nnx.Param(jnp.concatenate(biases)) if biases else None

    def __call__(
        self, x: Float[Array, "*b inputs"], residual: Float[Array, "*b outputs"] | None = None
    ) -> Float[Array, "*b outputs"]:
        """What the layers make of x, side by side, added to a residual."""
        rows, bias = self.rows[...], None if self.bias is None else self.bias[...]
        x, rows, bias = promote_dtype((x, rows, bias), dtype=self.dtype)
        if _is_for_kernel(x):
            if bias is None and (residual is None or residual.dtype == x.dtype):
                return _by_kernel(x, rows, residual)
            out = _by_kernel(x, rows)
        else:
            out = jax.lax.dot_general(x, rows, (((x.ndim - 1,), (1,)), ((), ())))
        if bias is not None:
            out += jnp.broadcast_to(bias, out.shape)
        return out if residual is None else residual + out

    def split(self, x: Float[Array, "*b inputs"]) -> list[Float[Array, "*b outputs"]]:
        """What each layer makes of x."""
        return jnp.split(self(x), self.ends, axis=-1)

    def gated(self, x: Float[Array, "*b inputs"]) -> Float[Array, "*b outputs"]:
        """The silu of what the first of two layers makes of x, times what the second does."""
        if self.bias is None and _is_for_kernel(x):
            x, rows = promote_dtype((x, self.rows[...]), dtype=self.dtype)
            return _by_kernel(x, rows, gated=True)
        gate, up = self.split(x)
        return nnx.silu(gate) * up


def _is_for_kernel(x: Array) -> bool:
    """Whether x is a single vector, and a GPU can run the kernel for it."""
    return x.size == x.shape[-1] and not has_several_devices() and dispatch.choose("matvec", None, x.dtype) == "triton"


def _by_kernel(x: Array, rows: Array, residual: Array | None = None, *, gated: bool = False) -> Array:
    """`matvec` of an x with axes of length 1 in front."""

    def run(x: Array, *arrays: Array) -> Array:
        *residuals, rows = arrays
        residual = residuals[0][0] if residuals else None
        return matvec(x[0], rows, residual, gated=gated, implementation="triton")[None]

    vectors = [array.reshape(1, -1) for array in (x, residual) if array is not None]
    return on_own_tokens(run, vectors, (rows,)).reshape(*x.shape[:-1], -1)


def prepare(model: Decoder) -> Decoder:
    """The model with joined projections, and with matrices in the type that it computes in where that is narrower.

    The blocks' matrices are copied, joined and transposed; all other arrays, tables among them, are the model's own and
    take no more memory. What was made is kept as long as the model lives and has the same arrays.
    """
    graphdef, tables, params = nnx.split(model, TableRows, ...)
    arrays = jax.tree.leaves((tables, params))
    known = _prepared.get(model)
    if known is not None and len(known[0]) == len(arrays) and all(map(operator.is_, known[0], arrays)):
        return known[1]
    dtype = resolve_dtype(model.config.dtype)
    # Narrowed first: of what is joined there are two copies for a moment.
    joined = nnx.merge(graphdef, tables, jax.tree.map(partial(_narrowed, dtype=dtype), params))
    blocks: list[Block] = [JoinedBlock(block) for block in joined.blocks]
    joined.blocks = nnx.List(blocks)
    _prepared[model] = (arrays, joined)
    return joined


_prepared: weakref.WeakKeyDictionary[Decoder, tuple[list[Array], Decoder]] = weakref.WeakKeyDictionary()


def _narrowed(weight: Array, *, dtype: DTypeLike) -> Array:
    """A matrix in a type; vectors (norms, biases) are used in the type in which they are kept."""
    return weight.astype(dtype) if weight.ndim >= 2 and jnp.dtype(dtype).itemsize < weight.dtype.itemsize else weight
