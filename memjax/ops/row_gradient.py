"""The gradient of a table, kept as its factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from memjax.ops.manual_axes import vary_like
from memjax.ops.precision import accumulator
from memjax.ops.shapes import in_range, require

PIECES = 16
"""Maximum number of scatters that `RowGradient.dense` unrolls."""

_PIECE_BYTES = 1 << 20
"""Bytes of products that one scatter may add, however small the table."""


class RowGradient(NamedTuple):
    """d table[r] = sum of weights[t, k] * vectors[t] over the picks (t, k) with indices[t, k] == r.

    The sum is never formed for the whole table: `row_update` consumes the factors. A pick whose index is negative or at
    least num_rows is ignored: it adds nothing and touches no row or state (see `without_padding`).
    """

    indices: Int[Array, "t k"]
    """Rows of the table that each token read."""
    weights: Float[Array, "t k"]
    """Factor of each pick."""
    vectors: Float[Array, "t d"]
    """Cotangent of the bag (embedding_bag) or the vectors (embedding_dot) of each token."""

    def without_padding(self, token_mask: Bool[Array, "*micro t"], num_rows: int) -> "RowGradient":
        """The gradient without the picks of padding tokens, for a table of num_rows rows.

        Padding has a gradient of zero, but rows with a gradient of zero still count as read: `rowwise_adam` decays
        their second moment, and `adam` moves them by their momentum.
        """
        require(
            "without_padding",
            token_mask.shape == self.indices.shape[:-1],
            "every token needs one flag",
            token_mask=token_mask,
            indices=self.indices,
        )
        indices = self.existing(num_rows).indices
        return self._replace(indices=jnp.where(token_mask[..., None], indices, num_rows))

    def scaled(self, factor: ArrayLike) -> "RowGradient":
        """The gradient times a number."""
        return self._replace(weights=self.weights * jnp.asarray(factor, self.weights.dtype))

    def existing(self, num_rows: int) -> "RowGradient":
        """The gradient with int32 indices, in which num_rows replaces every index out of range."""
        is_row = in_range(self.indices, num_rows)
        return self._replace(indices=jnp.where(is_row, self.indices.astype(jnp.int32), jnp.int32(num_rows)))

    def check(self, width: int | None = None) -> None:
        """Checks that the factors fit together, and that they are for rows of the given width.

        Raises:
            ValueError: they are not; the message has the shapes.
        """
        indices, weights, vectors = self
        require(
            "RowGradient",
            indices.ndim == 2
            and jnp.issubdtype(indices.dtype, jnp.integer)
            and indices.shape == weights.shape
            and vectors.ndim == 2
            and vectors.shape[0] == indices.shape[0],
            "must have integer indices [tokens, picks], as many weights, and vectors [tokens, width]",
            **self._asdict(),
        )
        if width is not None and vectors.shape[1] != width:
            raise ValueError(f"vectors of width {vectors.shape[1]} cannot update rows of {width}")

    def dense(self, num_rows: int) -> Float[Array, "n d"]:
        """The whole gradient, mostly zeros, in float32 or wider: for plain autodiff and for comparisons.

        Products are formed for a few picks of all tokens at a time, and take at most a quarter of the result's memory
        (or 1 MiB). Up to PIECES scatters are unrolled: XLA then adds the gradients of all uses of a float32 table into
        one array, instead of keeping one per use until the end.
        """
        self.check()
        dtype = accumulator(self.vectors.dtype)
        vectors, weights = self.vectors.astype(dtype), self.weights.astype(dtype)
        existing = self.existing(num_rows).indices
        (tokens, picks), width = existing.shape, vectors.shape[1]

        def add(gradient: Array, indices: Array, weights: Array) -> Array:
            # Pick by pick, as in the loop, so that both sum in the same order.
            products = weights.T[:, :, None] * vectors[None]
            return gradient.at[indices.T.reshape(-1)].add(products.reshape(indices.size, width))

        gradient = vary_like(jnp.zeros((num_rows, width), dtype), self)
        if existing.size == 0:
            return gradient
        at_once = max(num_rows * width // 4, _PIECE_BYTES // dtype.itemsize) // max(1, tokens * width)
        if at_once == 0 or picks > PIECES * at_once:
            one = lambda pick, gradient: add(gradient, existing[:, pick, None], weights[:, pick, None])
            return jax.lax.fori_loop(0, picks, one, gradient)
        for first in range(0, picks, at_once):
            some = slice(first, first + at_once)
            gradient = add(gradient, existing[:, some], weights[:, some])
        return gradient
