"""A model's weights in the form used for decoding: projections of the same input fused, matrices in the compute type.

A decoding step is bound by reading weights, so projections of the same input are one matrix product. Matrices of blocks
are stored as [outputs, inputs], so that multiplying a single vector reduces along rows of the matrix, in one kernel at
memory speed; reducing along columns takes XLA several times as long on GPUs. The model itself computes with the same
casts, so only the order of summation differs.
"""

import itertools
import operator
import weakref
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.memory.keys import Lookup
from memjax.memory.layer import MemoryLayer
from memjax.memory.read import Perturbations, TableRead
from memjax.memory.table import TableRows, ValueTable
from memjax.models.attention import Attention, KeyValues
from memjax.models.block import Block
from memjax.models.decoder import Decoder
from memjax.models.feed_forward import FeedForward
from memjax.ops import dispatch
from memjax.ops.matvec.api import matvec
from memjax.ops.precision import resolve_dtype
from memjax.ops.product_key_search.api import weighted_search
from memjax.sharding.axes import fold, has_several_devices, on_own_tokens, unfold


class JoinedAttention(Attention):
    """Attention with the query, key and value projections in one matrix."""

    def __init__(self, attention: Attention):
        _take_over(self, attention, without=("query", "key", "value", "out"))
        self.joined = Joined.of(attention.query, attention.key, attention.value)
        self.out = Joined.of(attention.out)

    def query_key_value(self, x: Float[Array, "b s dim"]) -> list[Float[Array, "b s width"]]:
        return self.joined.split(x)


class JoinedFeedForward(FeedForward):
    """SwiGLU with the gate and up projections in one matrix."""

    def __init__(self, feed_forward: FeedForward):
        self.joined = Joined.of(feed_forward.gate, feed_forward.up)
        self.down = Joined.of(feed_forward.down)

    def __call__(
        self, x: Float[Array, "*b dim"], residual: Float[Array, "*b dim"] | None = None
    ) -> Float[Array, "*b dim"]:
        return self.down(self.joined.gated(x), residual)


class JoinedMemory(MemoryLayer):
    """A memory layer with the query and gate projections in one matrix."""

    def __init__(self, layer: MemoryLayer):
        _take_over(self, layer, without=("gate_proj", "value_proj"))
        keys, gates = layer.keys, [layer.gate_proj] if layer.gate_proj else []
        kernels = [keys.query_kernel[...], *(gate.kernel[...] for gate in gates)]
        biases = [keys.query_bias[...], *(gate.bias[...] for gate in gates if gate.bias is not None)]
        self.joined = Joined(kernels, biases, keys.dtype)
        self.value = Joined.of(layer.value_proj) if layer.value_proj else None
        del self.keys.query_kernel, self.keys.query_bias

    def __call__(
        self, x: Float[Array, "*b dim"], *tables: ValueTable, residual: Float[Array, "*b dim"] | None = None
    ) -> Float[Array, "*b dim"]:
        (table,), (queries, *gates) = tables, self.joined.split(x)
        return self._project(x, self.read(table, self._lookup(fold(queries))), gates, residual)

    def with_reads(
        self, x: Float[Array, "*b dim"], *tables: ValueTable, perturbations: Perturbations | None = None
    ) -> tuple[Float[Array, "*b dim"], tuple[TableRead, ...]]:
        (table,), (perturbation,), (queries, *gates) = tables, perturbations or (None,), self.joined.split(x)
        lookup = self._lookup(fold(queries))
        out = self._project(x, self.read(table, lookup, perturbation), gates)
        return out, (TableRead.bag(table, *lookup),)

    def _lookup(self, queries: Float[Array, "t width"]) -> Lookup:
        """The slots and weights of projected queries; on a single device, one operation gives both."""
        if has_several_devices():
            return self.keys.lookup(queries)
        keys, shape = self.keys, (queries.shape[0], self.picks)
        search = {"scale": keys.score_scale, "implementation": self.implementation}
        weights, slots = weighted_search(*keys.vectors(queries), keys.top_k, **search)
        return Lookup(slots.reshape(shape), weights.reshape(shape))

    def _project(self, x: Array, bag: Array, gates: Sequence[Array], residual: Array | None = None) -> Array:
        """The layer's output from its weighted sums of rows, `bag`, and the gate's projection of the input."""
        y, input_gate = unfold(bag, x).astype(x.dtype), gates[0] if gates else None
        if self.value is not None and self.output_gate is None and self.scale is None:
            return self.value(y, residual, input_gate)
        out = self.scaled(x, y if self.value is None else self.value(y, None, input_gate))
        return out if residual is None else residual + out


class JoinedBlock(Block):
    """A block with joined projections, which add their outputs to the residual stream themselves."""

    def __init__(self, block: Block):
        _take_over(self, block)
        self.attention = JoinedAttention(block.attention)
        if block.feed_forward is not None:
            self.feed_forward = JoinedFeedForward(block.feed_forward)
        if type(block.lookup) is MemoryLayer and block.norm_placement == "pre":
            setattr(self, str(block.lookup_kind), JoinedMemory(block.lookup))

    def with_cache(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        cache: KeyValues | None,
        tables: tuple[ValueTable, ...] = (),
    ) -> tuple[Float[Array, "b s dim"], KeyValues]:
        if self.norm_placement == "post":  # outputs are normalised before they are added
            return super().with_cache(x, positions, cache, tables)
        x, inputs = self.attention_norm(x)
        attended, cache = self.attention.with_cache(inputs, positions, cache)
        x, inputs = self.mixer_norm(attended, x)
        if self.feed_forward is not None:
            x = self.feed_forward(inputs, x)
        if self.experts is not None:
            x = x + self.experts(inputs)[0]
        if isinstance(self.lookup, JoinedMemory):
            x = self.lookup(inputs, *tables, residual=x)
        elif self.lookup is not None:
            x = x + self.lookup(inputs, *tables)
        return x, cache


def _take_over(target: nnx.Module, source: nnx.Module, without: Collection[str] = ()) -> None:
    """Copies a module's public attributes to another module, except those in `without`."""
    for name, value in vars(source).items():
        if name not in without and not name.startswith("_"):
            setattr(target, name, value)


class Joined(nnx.Module):
    """One or more linear layers with the same input, stored as one matrix with a row per output."""

    def __init__(self, kernels: Sequence[Array], biases: Sequence[Array], dtype: DTypeLike | None):
        """Joins matrices of shape [inputs, outputs]; either each has a bias or none has."""
        self.ends = tuple(itertools.accumulate(kernel.shape[1] for kernel in kernels))[:-1]
        self.dtype = dtype
        self.rows = nnx.Param(_joined([kernel.T for kernel in _readable(kernels)]))
        self.bias = nnx.Param(_joined(_readable(biases))) if biases else None

    @classmethod
    def of(cls, *layers: nnx.Linear) -> "Joined":
        """Joins the layers' matrices; either all layers have a bias or none has."""
        biases = [layer.bias[...] for layer in layers if layer.bias is not None]
        return cls([layer.kernel[...] for layer in layers], biases, layers[0].dtype)

    def __call__(
        self,
        x: Float[Array, "*b inputs"],
        residual: Float[Array, "*b outputs"] | None = None,
        input_gate: Float[Array, "*b inputs"] | None = None,
    ) -> Float[Array, "*b outputs"]:
        """The layers' outputs for x * silu(input_gate), concatenated and added to the residual."""
        x, rows, bias, input_gate = self._promoted(x, input_gate)
        if _is_for_kernel(x) and (residual is None or residual.dtype == x.dtype):
            return _by_kernel(x, rows, residual=residual, bias=bias, input_gate=input_gate)
        if input_gate is not None:
            x = x * nnx.silu(input_gate)
        out = jax.lax.dot_general(x, rows, (((x.ndim - 1,), (1,)), ((), ())))
        if bias is not None:
            out += jnp.broadcast_to(bias, out.shape)
        return out if residual is None else residual + out

    def _promoted(self, x: Array, input_gate: Array | None = None) -> tuple[Array, Array, Array | None, Array | None]:
        """x, rows, bias and gate, promoted to one type."""
        bias = None if self.bias is None else self.bias[...]
        return promote_dtype((x, self.rows[...], bias, input_gate), dtype=self.dtype)

    def split(self, x: Float[Array, "*b inputs"]) -> list[Float[Array, "*b outputs"]]:
        """Each layer's output for x."""
        return jnp.split(self(x), self.ends, axis=-1)

    def gated(self, x: Float[Array, "*b inputs"]) -> Float[Array, "*b outputs"]:
        """SwiGLU: silu of the first layer's output times the second layer's output."""
        if _is_for_kernel(x):
            x, rows, bias, _ = self._promoted(x)
            return _by_kernel(x, rows, bias=bias, gated=True)
        gate, up = self.split(x)
        return nnx.silu(gate) * up


def _readable(arrays: Sequence[Array]) -> Sequence[Array | np.ndarray]:
    """The arrays, on a single CPU device as NumPy arrays: NumPy is done before XLA would have compiled a program."""
    on_cpu = jax.default_backend() == "cpu" and not has_several_devices()
    return [np.asarray(array) for array in arrays] if on_cpu else arrays


def _joined(arrays: Sequence[Array | np.ndarray]) -> Array:
    """The arrays concatenated along the first axis."""
    if all(isinstance(array, np.ndarray) for array in arrays):
        return jax.device_put(np.concatenate(arrays))
    return jnp.concatenate(arrays)


def _is_for_kernel(x: Array) -> bool:
    """Whether x is a single vector, and the device can run the Triton kernel for it."""
    return x.size == x.shape[-1] and not has_several_devices() and dispatch.choose("matvec", None, x.dtype) == "triton"


def _by_kernel(x: Array, rows: Array, *, gated: bool = False, **vectors: Array | None) -> Array:
    """`matvec` for x and other vectors whose leading axes have length 1."""
    given = {name: array.reshape(-1) for name, array in vectors.items() if array is not None}
    settings = {"names": tuple(given), "gated": gated}
    return on_own_tokens(_matvec, (x.reshape(1, -1),), (rows, *given.values()), **settings).reshape(*x.shape[:-1], -1)


def _matvec(x: Array, rows: Array, *vectors: Array, names: tuple[str, ...], gated: bool) -> Array:
    return matvec(x[0], rows, **dict(zip(names, vectors, strict=True)), gated=gated, implementation="triton")[None]


class Prepared(NamedTuple):
    """A model prepared for decoding, whole and split into the parts that compiled programs take."""

    model: Decoder
    graphdef: Any
    structure: Any
    """Tree structure of the state with these `leaves`."""
    leaves: tuple[Array, ...]
    """A flat tuple, because every call of a program flattens its arguments."""


def prepare(model: Decoder) -> Prepared:
    """The model with joined projections, and with matrices cast to the compute type if that is narrower.

    The blocks' matrices are copied, joined and transposed; other arrays, including tables, are shared with the model
    unless they are cast. The result is cached for as long as the model lives and keeps the same arrays.
    """
    graphdef, tables, params = nnx.split(model, TableRows, ...)
    arrays = jax.tree.leaves((tables, params))
    known = _prepared.get(model)
    if known is not None and len(known[0]) == len(arrays) and all(map(operator.is_, known[0], arrays)):
        return known[1]
    dtype = resolve_dtype(model.config.dtype)
    # Cast first: while matrices are joined, there are two copies of them.
    joined = nnx.merge(graphdef, tables, jax.tree.map(partial(_narrowed, dtype=dtype), params))
    blocks: list[Block] = [JoinedBlock(block) for block in joined.blocks]
    joined.blocks = nnx.List(blocks)
    graphdef, state = nnx.split(joined)
    leaves, structure = jax.tree.flatten(state)
    found = Prepared(joined, graphdef, structure, tuple(leaves))
    _prepared[model] = (arrays, found)
    return found


_prepared: weakref.WeakKeyDictionary[Decoder, tuple[list[Array], Prepared]] = weakref.WeakKeyDictionary()


def _narrowed(weight: Array, *, dtype: DTypeLike) -> Array:
    """A matrix cast to a narrower type; vectors (norms, biases) keep their type."""
    return weight.astype(dtype) if weight.ndim >= 2 and jnp.dtype(dtype).itemsize < weight.dtype.itemsize else weight
