"""Reads of tables, and the row gradients derived from them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.memory.table import ValueTable
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.sharding.axes import has_memory_axis, place, split_tokens
from memjax.sharding.rules import BAGS

ReadKind = Literal["bag", "dot"]
"""bag: weighted sums of rows, `embedding_bag`; dot: products of rows with a vector per token, `embedding_dot`."""

Perturbations = tuple[Float[Array, "t _"], ...]
"""Zeros added to what a layer reads, one array per read, in the same order (`flax.nnx.Perturbation`)."""


class TableName(str):
    """The name of a table; part of a pytree's structure, not one of its leaves."""


jax.tree_util.register_static(TableName)


class TableRead(NamedTuple):
    """One read of a table: the factors of its row gradient that are known before the backward pass.

    The missing factor is the cotangent of what was read: the weights of a dot, the vectors of a bag.
    """

    table: TableName
    indices: Int[Array, "t k"]
    """Rows read by each token."""
    weights: Float[Array, "t k"] | None
    """Factor of each row in a bag; None in a dot."""
    vectors: Float[Array, "t d"] | None
    """The vector by which each token's rows are multiplied in a dot; None in a bag."""

    @classmethod
    def bag(cls, table: ValueTable, indices: Int[Array, "t k"], weights: Float[Array, "t k"]) -> "TableRead":
        """The read of `embedding_bag(table, indices, weights)`."""
        return cls(TableName(table.name), indices, weights, None)

    @classmethod
    def dot(cls, table: ValueTable, indices: Int[Array, "t k"], vectors: Float[Array, "t d"]) -> "TableRead":
        """The read of `embedding_dot(table, indices, vectors)`."""
        return cls(TableName(table.name), indices, None, vectors)

    def row_gradient(self, cotangent: Float[Array, "*micro t _"]) -> RowGradient:
        """The gradient of the table, given the cotangent of the bag or dot, which is that of its perturbation."""
        weights = cotangent if self.weights is None else self.weights
        vectors = cotangent if self.vectors is None else self.vectors
        return RowGradient(self.indices, weights, vectors)

    def without_padding(self, token_mask: Bool[Array, "*micro t"], num_rows: int) -> "TableRead":
        """The read without the picks of padding; see `RowGradient.without_padding`."""
        return self._replace(indices=jnp.where(token_mask[..., None], self.indices, jnp.int32(num_rows)))


Reads = Mapping[str, tuple[TableRead, ...]]
"""Reads, by layer name."""


def row_gradients(reads: Reads, cotangents: Mapping[str, Any]) -> dict[str, list[RowGradient]]:
    """The row gradients of every table, given reads and the cotangents of their perturbations by layer."""
    found: dict[str, list[RowGradient]] = {}
    for name, of_layer in reads.items():
        for read, cotangent in zip(of_layer, cotangents[name], strict=True):
            found.setdefault(read.table, []).append(read.row_gradient(cotangent))
    return found


def zero_perturbation(kind: ReadKind, num_tokens: int, picks: int, table: Any) -> Float[Array, "t _"]:
    """The perturbation of a read, sharded as it will be added. Only the table's shape and dtype are used."""
    if kind == "dot":
        return split_tokens(jnp.zeros((num_tokens, picks), accumulator(table.dtype)))
    zeros = jnp.zeros((num_tokens, table.shape[1]), table.dtype)
    return place(zeros, BAGS) if has_memory_axis() else zeros
