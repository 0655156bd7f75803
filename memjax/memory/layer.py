"""The memory layer: a lookup in a large table of values in place of a feed-forward layer."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.config.memory import MemoryConfig
from memjax.config.section import with_settings
from memjax.memory import sharded
from memjax.memory.keys import Lookup, ProductKeys, check_width
from memjax.memory.lookup import LookupLayer
from memjax.memory.read import Perturbations, TableRead
from memjax.memory.table import ValueTable
from memjax.ops.precision import init_in_float32
from memjax.ops.shapes import require
from memjax.sharding.axes import unfold
from memjax.sharding.rules import named


class MemoryLayer(LookupLayer):
    """The layer of "Memory Layers at Scale" (arXiv:2412.09764): y = sum of softmax weight * value of the best slots.

    Memory+ (gate='silu') returns W2 (y * silu(W1 x)); gate='none' returns y, or W2 y if value_dim is not dim. With
    output_gate, the result is scaled by sigmoid(w x), one number per token; with placement="parallel", by one number
    per channel, initially zero. The model owns the table and passes it in, so that several layers can share it:

        table = ValueTable(num_slots=64**2, value_dim=256, rngs=rngs)
        layer = MemoryLayer(256, num_keys=64, num_heads=4, top_k=8, key_dim=128, rngs=rngs)
        y = layer(x, table)

    It trains under plain autodiff with any optimizer; `memjax.value_and_grad` avoids a gradient of the table's size.
    """

    READS = ("bag",)

    def __init__(
        self,
        dim: int,
        config: MemoryConfig | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        """A layer of width dim over a table of num_keys ** 2 rows of value_dim (default: dim); biases start at zero.

        Args:
            dim: width of inputs and outputs.
            config: the layer's settings; None takes the defaults.
            dtype: type of activations; None takes the common type of inputs and parameters.
            param_dtype: type of the parameters.
            implementation: implementation of search and bag; None takes the fastest that can run.
            rngs: source of the `params` key.
            **settings: fields of `MemoryConfig` that replace those of config.

        Raises:
            TypeError: a setting is unknown.
            ValueError: `gate` is unknown, key_dim is odd, num_keys cannot offer top_k slots, or a number is out of its
                range.
        """
        config = with_settings(type(self), config or MemoryConfig(), settings)
        self.dim, self.value_dim = dim, config.width(dim)
        self.picks, self.implementation = config.picks, implementation
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.keys = ProductKeys(dim, config, implementation=implementation, **types)

        def linear(inputs: int, outputs: int, *axes: str, init_dim: int | None = None) -> nnx.Linear:
            init = init_in_float32(nnx.initializers.normal((init_dim or outputs) ** -0.5))
            metadata = {"kernel_metadata": named(*axes), "bias_metadata": named(axes[1])}
            return nnx.Linear(inputs, outputs, kernel_init=init, **metadata, **types)

        gated = config.gate == "silu"
        self.gate_proj = linear(dim, self.value_dim, "embed", "value") if gated else None
        self.value_proj = linear(self.value_dim, dim, "value", "embed") if gated or self.value_dim != dim else None
        self.output_gate = linear(dim, 1, "embed", "gate", init_dim=dim) if config.output_gate else None
        self.scale = nnx.Param(jnp.zeros((dim,), param_dtype)) if config.placement == "parallel" else None

    def with_reads(
        self, x: Float[Array, "*b dim"], *tables: ValueTable, perturbations: Perturbations | None = None
    ) -> tuple[Float[Array, "*b dim"], tuple[TableRead, ...]]:
        (table,), (perturbation,) = tables, self.perturbations_of(perturbations)
        lookup = self.lookup(x)
        return self.combine(x, self.read(table, lookup, perturbation)), (TableRead.bag(table, *lookup),)

    def lookup(self, x: Float[Array, "*b dim"]) -> Lookup:
        """The slots that each token reads and their weights; batch axes are folded into tokens."""
        return self.keys(x)

    def read(
        self, table: ValueTable, lookup: Lookup, perturbation: Float[Array, "t value_dim"] | None = None
    ) -> Float[Array, "t value_dim"]:
        """The bag of each token, plus the perturbation (see `row_sparse_value_and_grad`)."""
        rows = table.rows_for(self.keys.num_slots, self.value_dim)
        return sharded.bag(rows, *lookup, perturbation, implementation=self.implementation)

    def combine(self, x: Float[Array, "*b dim"], bag: Float[Array, "t value_dim"]) -> Float[Array, "*b dim"]:
        """The layer's output, given its input and its bag.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_width(type(self).__name__, x, self.dim)
        fits = bag.shape == (math.prod(x.shape[:-1]), self.value_dim)
        require(type(self).__name__, fits, f"every token needs a bag of {self.value_dim} columns", x=x, bag=bag)
        x = self.keys.promoted(x)
        y = unfold(bag, x).astype(x.dtype)
        if self.gate_proj is not None:
            y = y * nnx.silu(self.gate_proj(x))
        return self.scaled(x, y if self.value_proj is None else self.value_proj(y))

    def scaled(self, x: Float[Array, "*b dim"], out: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        """The output times the output gate and the scale of a parallel memory, where configured."""
        if self.output_gate is not None:
            out = out * nnx.sigmoid(self.output_gate(x))
        if self.scale is not None:
            out = out * self.scale[...].astype(out.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return out
