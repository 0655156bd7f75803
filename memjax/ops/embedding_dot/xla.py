"""The embedding dot in plain XLA: one pick of every token at a time, so nothing larger than [t, d] exists."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator
from memjax.ops.table import Table


def embedding_dot(
    table: Table | Float[Array, "n d"], indices: Int[Array, "t k"], vectors: Float[Array, "t d"]
) -> Float[Array, "t k"]:
    """The reference's products, summed in float32 or wider."""
    table, dtype = Table.of(table), accumulator(table.dtype)
    vectors = vectors.astype(dtype)

    def dot_pick(rows: Int[Array, " t"]) -> Float[Array, " t"]:
        return jnp.sum(table.take(rows, dtype) * vectors, axis=-1)

    return jax.lax.map(dot_pick, indices.T).T
