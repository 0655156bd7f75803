"""The definition of the embedding bag."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator
from memjax.ops.table import Table


def embedding_bag(
    table: Table | Float[Array, "n d"], indices: Int[Array, "t k"], weights: Float[Array, "t k"]
) -> Float[Array, "t d"]:
    """For each token, the sum of its k table rows, each times its weight (arXiv:1907.05242)."""
    dtype = accumulator(table.dtype)
    picked = Table.of(table).take(indices, dtype)
    return jnp.einsum("tkd,tk->td", picked, weights.astype(dtype)).astype(table.dtype)
