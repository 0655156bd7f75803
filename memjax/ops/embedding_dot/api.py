"""The embedding dot as others call it: any batch shape, gradients, choice of the implementation."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch
from memjax.ops.manual_axes import vary_together
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.ops.shapes import check_table, require
from memjax.ops.table import Table, differentiable

SAVED_NAME = "memory_dot"
"""`checkpoint_name` of the output, so that rematerialisation can keep it."""


def embedding_dot(
    table: Table | Float[Array, "n d"],
    indices: Int[Array, "*t k"],
    vectors: Float[Array, "*t d"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*t k"]:
    """out[t, k] = <vectors[t], table[indices[t, k]]>, in float32 or wider: the transpose of the embedding bag.

    Differentiable in `table` (see `embedding_bag` for its price) and `vectors`. Indices outside 0..n-1 are not checked.

    Raises:
        ValueError: shapes do not fit together, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here, or not read this table.
        TypeError: the table is differentiated, and is read-only.
    """
    table = Table.of(table)
    check_table("embedding_dot", table, indices)
    name = dispatch.choose_for("embedding_dot", implementation, table)
    batch, picks = indices.shape[:-1], indices.shape[-1]
    require(
        "embedding_dot",
        vectors.shape == (*batch, table.shape[1]),
        "every token needs one vector of the table's width",
        indices=indices,
        vectors=vectors,
        table=table,
    )
    if indices.size == 0:
        return jnp.zeros(indices.shape, accumulator(table.dtype))
    tokens = math.prod(batch)
    factors = vary_together((table, indices.reshape(tokens, picks), vectors.reshape(tokens, -1)))
    out: Any = _dot(name, *factors)
    return out.reshape(*batch, picks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(name: str, table: Table, indices: Array, vectors: Array) -> Array:
    return dispatch.load("embedding_dot", name).embedding_dot(table, indices, vectors)


def _dot_forward(name, table, indices, vectors):
    wanted = ("table",) if differentiable("embedding_dot", table) else ()
    table = jax.tree.map(lambda leaf: leaf.value, table)
    out = _dot(name, table, indices.value, vectors.value)
    residuals = (table, indices.value, vectors.value, dict.fromkeys(wanted))
    return checkpoint_name(out, SAVED_NAME), residuals


def _dot_backward(name, residuals, cotangent):
    table, indices, vectors, wanted = residuals
    d_vectors = dispatch.load("embedding_bag", name).embedding_bag(table, indices, cotangent)
    d_table = None
    if "table" in wanted:
        rows = RowGradient(indices, cotangent, vectors).dense(table.shape[0]).astype(table.dtype)
        d_table = dataclasses.replace(table, rows=rows)
    return d_table, None, d_vectors.astype(vectors.dtype)


_dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)
