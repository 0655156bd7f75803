"""The definition of the embedding dot."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator


def embedding_dot(
    table: Float[Array, "n d"], indices: Int[Array, "t k"], vectors: Float[Array, "t d"]
) -> Float[Array, "t k"]:
    """For each token, the inner products of its vector with its k table rows."""
    dtype = accumulator(table.dtype)
    return jnp.einsum("tkd,td->tk", table[indices].astype(dtype), vectors.astype(dtype))
