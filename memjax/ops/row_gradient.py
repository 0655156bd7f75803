"""The gradient of a table, kept as the factors it is made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator


class RowGradient(NamedTuple):
    """d table[r] = sum of weights[t, k] * vectors[t] over the picks (t, k) with indices[t, k] == r.

    The product is never formed for the whole table: `row_update` consumes the factors.
    """

    indices: Int[Array, "t k"]
    """Rows of the table that each token read."""
    weights: Float[Array, "t k"]
    """Factor of each pick."""
    vectors: Float[Array, "t d"]
    """Cotangent of the bag (embedding_bag) or the vectors (embedding_dot) of each token."""

    def dense(self, num_rows: int) -> Float[Array, "n d"]:
        """The whole gradient, mostly zeros, in float32 or wider: for plain autodiff and for comparisons."""
        dtype = accumulator(self.vectors.dtype)
        vectors, weights = self.vectors.astype(dtype), self.weights.astype(dtype)

        def add_pick(pick: Array, gradient: Array) -> Array:
            return gradient.at[self.indices[:, pick]].add(weights[:, pick, None] * vectors)

        gradient = jnp.zeros((num_rows, self.vectors.shape[1]), dtype)
        return jax.lax.fori_loop(0, self.indices.shape[1], add_pick, gradient)
