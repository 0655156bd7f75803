"""The expert lookup (PEER): a feed-forward layer's place taken by a few of very many experts with one hidden unit."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.memory import sharded
from memjax.memory.keys import Lookup, ProductKeys, check_width
from memjax.memory.table import ValueTable
from memjax.ops.row_gradient import RowGradient
from memjax.ops.shapes import require
from memjax.ops.table import Table
from memjax.sharding.axes import fold, unfold


class ExpertTaps(NamedTuple):
    """Zeros that an expert lookup adds to what it reads, or their cotangents (see `row_sparse_value_and_grad`)."""

    dots: Float[Array, "t k"]
    """Added to the products of inputs and experts."""
    bags: Float[Array, "t dim"]
    """Added to the sums of the experts' outputs."""

    @classmethod
    def zeros(cls, num_tokens: int, picks: int, dim: int, table_dtype: DTypeLike) -> "ExpertTaps":
        """Taps for num_tokens tokens with `picks` experts each, and tables of the given width and type."""
        return cls(sharded.zero_dot_tap(num_tokens, picks, table_dtype), sharded.zero_tap(num_tokens, dim, table_dtype))


class ExpertRowGradients(NamedTuple):
    """The gradients of an expert lookup's two tables."""

    inputs: RowGradient
    outputs: RowGradient


class ExpertReads(NamedTuple):
    """What an expert lookup reads for each token: the same rows of both tables."""

    indices: Int[Array, "t k"]
    """Experts, the picks of all heads one after the other."""
    weights: Float[Array, "t k"]
    """Factor of each expert's output: what its hidden unit gives, times the softmax weight."""
    vectors: Float[Array, "t dim"]
    """The token, as it was compared with the experts' inputs."""

    def row_gradients(self, taps: ExpertTaps) -> ExpertRowGradients:
        """The gradients of both tables from the cotangents of the taps."""
        return ExpertRowGradients(
            inputs=RowGradient(self.indices, taps.dots, self.vectors),
            outputs=RowGradient(self.indices, self.weights, taps.bags),
        )


class ExpertLookupLayer(nnx.Module):
    """Parameter-efficient expert retrieval (PEER, arXiv:2407.04153): y = sum of weight * gelu(<x, u>) * v.

    Product keys pick the experts of each token; u and v are an expert's rows of the tables `inputs` and `outputs`. The
    tables are owned by the model and passed in, so that several layers can share them:

        inputs, outputs = (ValueTable(num_slots=64**2, value_dim=256, rngs=rngs) for _ in range(2))
        layer = ExpertLookupLayer(256, num_keys=64, num_heads=4, top_k=8, key_dim=128, rngs=rngs)
        y = layer(x, inputs, outputs)

    It trains under plain autodiff with any optimizer; `row_sparse_value_and_grad` saves two gradients of their size.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int = 768,
        num_heads: int = 4,
        top_k: int = 32,
        key_dim: int = 256,
        qk_norm: bool = False,
        score_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """A layer of width dim over num_keys ** 2 experts; the defaults are those of arXiv:2412.09764.

        Args:
            dim: width of inputs and outputs, and of the tables' rows.
            num_keys: sub-keys per half.
            num_heads: independent lookups, whose outputs add up.
            top_k: experts per head and token.
            key_dim: width of queries and keys, both halves together; even.
            qk_norm: scale the halves of queries and keys to unit length.
            score_scale: factor on the scores before the softmax.
            dtype: type of activations; None promotes inputs and parameters.
            param_dtype: type of the parameters.
            implementation: of search, dot and bag; None takes the fastest that can run.
            rngs: source of the `params` key.

        Raises:
            ValueError: key_dim is odd, num_keys cannot offer top_k experts, or a number is out of its range.
        """
        self.dim, self.implementation = dim, implementation
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

    def __call__(self, x: Float[Array, "*b dim"], inputs: ValueTable, outputs: ValueTable) -> Float[Array, "*b dim"]:
        """The layer's output.

        Raises:
            ValueError: x is of another width, or a table's shape is not the one that the layer addresses.
        """
        return self.read(x, self.lookup(x), inputs, outputs)[0]

    def lookup(self, x: Float[Array, "*b dim"]) -> Lookup:
        """Which experts each token asks, with which softmax weights; batch axes are folded into tokens."""
        return self.keys(x)

    def read(
        self,
        x: Float[Array, "*b dim"],
        lookup: Lookup,
        inputs: ValueTable,
        outputs: ValueTable,
        taps: ExpertTaps | None = None,
    ) -> tuple[Float[Array, "*b dim"], ExpertReads]:
        """The output, and what it was read from; taps are added on the way (see `row_sparse_value_and_grad`).

        Raises:
            ValueError: shapes do not fit together.
        """
        check_width(type(self).__name__, x, self.dim)
        fits = lookup.indices.shape[:1] == (math.prod(x.shape[:-1]),)
        require(type(self).__name__, fits, "every token needs its picks", x=x, indices=lookup.indices)
        dot_tap, bag_tap = taps or (None, None)
        dots, vectors = sharded.dot(
            self._rows(inputs, "inputs"),
            lookup.indices,
            fold(x),
            dot_tap,
            implementation=self.implementation,
        )
        weights = lookup.weights * jax.nn.gelu(dots, approximate=False)
        bag = sharded.bag(
            self._rows(outputs, "outputs"), lookup.indices, weights, bag_tap, implementation=self.implementation
        )
        y = unfold(bag, x).astype(x.dtype)
        return y, ExpertReads(lookup.indices, weights, vectors)

    def zero_taps(self, num_tokens: int, table_dtype: DTypeLike) -> ExpertTaps:
        """Taps for a batch of num_tokens tokens and tables of the given type."""
        return ExpertTaps.zeros(num_tokens, self.keys.num_heads * self.keys.top_k, self.dim, table_dtype)

    def _rows(self, table: ValueTable, name: str) -> Table | Float[Array, "n dim"]:
        return table.rows_for(self.keys.num_slots, self.dim, name=f"the table of the experts' {name}")
