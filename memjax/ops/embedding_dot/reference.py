"""The definition of the embedding dot."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator
from memjax.ops.table import Table


def embedding_dot(
    table: Table | Float[Array, "n d"], indices: Int[Array, "t k"], vectors: Float[Array, "t d"]
) -> Float[Array, "t k"]:
    """For each token, the inner products of its vector with its k table rows."""
    dtype = accumulator(table.dtype)
    picked = Table.of(table).take(indices, dtype)
    return jnp.einsum("tkd,td->tk", picked, vectors.astype(dtype))
