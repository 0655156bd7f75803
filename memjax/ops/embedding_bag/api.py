"""Public API of the embedding bag: batch shapes, gradients, dispatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch
from memjax.ops.shapes import check_table, require
from memjax.ops.table import Table
from memjax.ops.table_read import IndexMode, read


def embedding_bag(
    table: Table | Float[Array, "n d"],
    indices: Int[Array, "*t k"],
    weights: Float[Array, "*t k"],
    *,
    mode: IndexMode = "fill",
    implementation: str | None = None,
) -> Float[Array, "*t d"]:
    """out[t] = sum_k weights[t, k] * table[indices[t, k]], summed in float32, returned in the table's type.

    Differentiable in `table` and `weights`. The table's gradient is as large as the table and is formed only when the
    table is differentiated; `memjax.row_sparse_value_and_grad` avoids it. Tables with scales or in host memory are
    read-only. A token with an index outside 0..n-1 gets NaN and no gradient, as with `jnp.take`; negative indices are
    outside too. mode="promise_in_bounds" skips that check: what such indices read is then undefined.

    Raises:
        ValueError: shapes do not fit together, or `mode` or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here, or cannot read this table.
        TypeError: the table is differentiated but read-only.
    """
    table, indices, weights = Table.of(table), jnp.asarray(indices), jnp.asarray(weights)
    check_table("embedding_bag", table, indices)
    name = dispatch.choose_for("embedding_bag", implementation, table)
    require(
        "embedding_bag",
        indices.shape == weights.shape and not jnp.iscomplexobj(weights),
        "every index needs one weight, a real number",
        indices=indices,
        weights=weights,
    )
    shape = (*indices.shape[:-1], table.shape[1])
    if indices.size == 0:
        return jnp.zeros(shape, table.dtype)
    out, exist = read("embedding_bag", name, table, indices, weights, mode)
    if exist is not None:
        out = jnp.where(exist.all(axis=1, keepdims=True), out, jnp.nan)
    return out.reshape(shape)
