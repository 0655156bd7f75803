"""The memory layer: a feed-forward layer's place taken by a lookup in a large table of values."""

import math
from typing import Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.config import checks
from memjax.memory import sharded
from memjax.memory.keys import Lookup, ProductKeys, check_width
from memjax.memory.table import ValueTable
from memjax.ops.precision import drawn_wide
from memjax.ops.shapes import require
from memjax.sharding.axes import unfold

Gate = Literal["none", "silu"]


class MemoryLayer(nnx.Module):
    """The layer of "Memory Layers at Scale" (arXiv:2412.09764): y = sum of softmax weight * value of the best slots.

    Memory+ (gate='silu') returns W2 (y * silu(W1 x)); gate='none' returns y, through W2 where value_dim is not dim.
    With output_gate the result is scaled by sigmoid(w x), one number a token; with zero_start by a number a channel.
    The table is owned by the model and passed in, so that several layers can share it:

        table = ValueTable(num_slots=64**2, value_dim=256, rngs=rngs)
        layer = MemoryLayer(256, num_keys=64, num_heads=4, top_k=8, key_dim=128, rngs=rngs)
        y = layer(x, table)

    It trains under plain autodiff with any optimizer; `row_sparse_value_and_grad` saves a gradient of its size.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int = 1024,
        num_heads: int = 4,
        top_k: int = 32,
        key_dim: int = 512,
        value_dim: int | None = None,
        gate: Gate = "silu",
        output_gate: bool = False,
        zero_start: bool = False,
        qk_norm: bool = False,
        score_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """A layer of width dim over a table of num_keys ** 2 rows of value_dim (default: dim); biases begin at zero.

        Args:
            dim: width of inputs and outputs.
            num_keys: sub-keys per half.
            num_heads: independent lookups, whose outputs add up.
            top_k: slots read per head and token.
            key_dim: width of queries and keys, both halves together; even.
            value_dim: width of the table's rows.
            gate: 'silu' for Memory+.
            output_gate: let each token turn its output down.
            zero_start: scale the output by learned numbers, one a channel, that begin at zero: a layer that is added to
                a trained model changes nothing at first.
            qk_norm: scale the halves of queries and keys to unit length.
            score_scale: factor on the scores before the softmax.
            dtype: type of activations; None promotes inputs and parameters.
            param_dtype: type of the parameters.
            implementation: of search and bag; None takes the fastest that can run.
            rngs: source of the `params` key.

        Raises:
            ValueError: `gate` is unknown, key_dim is odd, num_keys cannot offer top_k slots, or a number is out of its
                range.
        """
        checks.refuse(checks.one_of(get_args(Gate), gate=gate) + checks.counts(value_dim=value_dim))
        self.dim, self.value_dim = dim, dim if value_dim is None else value_dim
        self.implementation = implementation
        self.keys = ProductKeys(
            dim,
            num_keys=num_keys,
            num_heads=num_heads,
            top_k=top_k,
            key_dim=key_dim,
            qk_norm=qk_norm,
            score_scale=score_scale,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rngs=rngs,
        )

        def linear(inputs: int, outputs: int, *, init_dim: int | None = None) -> nnx.Linear:
            init = drawn_wide(nnx.initializers.normal((init_dim or outputs) ** -0.5))
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=param_dtype, kernel_init=init, rngs=rngs)

        gated = gate == "silu"
        self.gate_proj = linear(dim, self.value_dim) if gated else None
        self.value_proj = linear(self.value_dim, dim) if gated or self.value_dim != dim else None
        self.output_gate = linear(dim, 1, init_dim=dim) if output_gate else None
        self.scale = nnx.Param(jnp.zeros((dim,), param_dtype)) if zero_start else None

    def __call__(self, x: Float[Array, "*b dim"], table: ValueTable) -> Float[Array, "*b dim"]:
        """The layer's output.

        Raises:
            ValueError: x is of another width, or the table's shape is not the one that the layer addresses.
        """
        lookup = self.lookup(x)
        return self.combine(x, self.read(table, lookup))

    def lookup(self, x: Float[Array, "*b dim"]) -> Lookup:
        """Which slots each token reads, with which weights; batch axes are folded into tokens."""
        return self.keys(x)

    def read(
        self, table: ValueTable, lookup: Lookup, tap: Float[Array, "t value_dim"] | None = None
    ) -> Float[Array, "t value_dim"]:
        """The bag of each token, plus the tap (see `row_sparse_value_and_grad`)."""
        rows = table.rows_for(self.keys.num_slots, self.value_dim)
        return sharded.bag(rows, *lookup, tap, implementation=self.implementation)

    def combine(self, x: Float[Array, "*b dim"], bag: Float[Array, "t value_dim"]) -> Float[Array, "*b dim"]:
        """The output from the layer's input and its bag.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_width(type(self).__name__, x, self.dim)
        fits = bag.shape == (math.prod(x.shape[:-1]), self.value_dim)
        require(type(self).__name__, fits, f"every token needs a bag of {self.value_dim} columns", x=x, bag=bag)
        y = unfold(bag, x)
        if self.gate_proj is not None:
            y = y.astype(x.dtype) * nnx.silu(self.gate_proj(x))
        out = y.astype(x.dtype) if self.value_proj is None else self.value_proj(y)
        if self.output_gate is not None:
            out = out * nnx.sigmoid(self.output_gate(x))
        return (
            out if self.scale is None else out * self.scale[...].astype(out.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        )
