"""Public API of the embedding dot: batch shapes, gradients, dispatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch
from memjax.ops.precision import accumulator
from memjax.ops.shapes import check_table, require
from memjax.ops.table import Table
from memjax.ops.table_read import IndexMode, read


def embedding_dot(
    table: Table | Float[Array, "n d"],
    indices: Int[Array, "*t k"],
    vectors: Float[Array, "*t d"],
    *,
    mode: IndexMode = "fill",
    implementation: str | None = None,
) -> Float[Array, "*t k"]:
    """out[t, k] = <vectors[t], table[indices[t, k]]>, in float32 or wider: the transpose of the embedding bag.

    Differentiable in `table` (see `embedding_bag` for the cost) and `vectors`. An index outside the table gives NaN and
    no gradient, unless mode="promise_in_bounds".

    Raises:
        ValueError: shapes do not fit together, or `mode` or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here, or cannot read this table.
        TypeError: the table is differentiated but read-only.
    """
    table, indices, vectors = Table.of(table), jnp.asarray(indices), jnp.asarray(vectors)
    check_table("embedding_dot", table, indices)
    name = dispatch.choose_for("embedding_dot", implementation, table)
    require(
        "embedding_dot",
        vectors.shape == (*indices.shape[:-1], table.shape[1]),
        "every token needs one vector of the table's width",
        indices=indices,
        vectors=vectors,
        table=table,
    )
    if indices.size == 0:
        return jnp.zeros(indices.shape, accumulator(table.dtype))
    out, exist = read("embedding_dot", name, table, indices, vectors, mode)
    if exist is not None:
        out = jnp.where(exist, out, jnp.nan)
    return out.reshape(indices.shape)
