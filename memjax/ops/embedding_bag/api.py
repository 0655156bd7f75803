"""The embedding bag as others call it: any batch shape, gradients, choice of the implementation."""

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
from memjax.ops.row_gradient import RowGradient
from memjax.ops.shapes import check_table, require
from memjax.ops.table import Table, differentiable

SAVED_NAME = "memory_bag"
"""`checkpoint_name` of the output, so that rematerialisation can keep it."""


def embedding_bag(
    table: Table | Float[Array, "n d"],
    indices: Int[Array, "*t k"],
    weights: Float[Array, "*t k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*t d"]:
    """out[t] = sum_k weights[t, k] * table[indices[t, k]], summed in float32, in the table's type.

    Differentiable in `table` and `weights`. The table's gradient is as large as the table and is formed only when the
    table is differentiated; `memjax.row_sparse_value_and_grad` avoids it. Tables with scales or in host memory are
    read-only. Indices outside 0..n-1 are not checked: what they read is undefined.

    Raises:
        ValueError: shapes do not fit together, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here, or not read this table.
        TypeError: the table is differentiated, and is read-only.
    """
    table = Table.of(table)
    check_table("embedding_bag", table, indices)
    name = dispatch.choose_for("embedding_bag", implementation, table)
    require(
        "embedding_bag",
        indices.shape == weights.shape,
        "every index needs one weight",
        indices=indices,
        weights=weights,
    )
    batch, picks = indices.shape[:-1], indices.shape[-1]
    if indices.size == 0:
        return jnp.zeros((*batch, table.shape[1]), table.dtype)
    tokens = math.prod(batch)
    factors = vary_together((table, indices.reshape(tokens, picks), weights.reshape(tokens, picks)))
    out: Any = _bag(name, *factors)
    return out.reshape(*batch, table.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bag(name: str, table: Table, indices: Array, weights: Array) -> Array:
    return dispatch.load("embedding_bag", name).embedding_bag(table, indices, weights)


def _bag_forward(name, table, indices, weights):
    # The tuple's length is part of the residuals' structure: a flag that stays static under jit.
    wanted = ("table",) if differentiable("embedding_bag", table) else ()
    table = jax.tree.map(lambda leaf: leaf.value, table)
    out = _bag(name, table, indices.value, weights.value)
    residuals = (table, indices.value, weights.value, dict.fromkeys(wanted))
    return checkpoint_name(out, SAVED_NAME), residuals


def _bag_backward(name, residuals, cotangent):
    table, indices, weights, wanted = residuals
    # The bag's transpose in its weights is the dot of the same rows with the cotangent.
    d_weights = dispatch.load("embedding_dot", name).embedding_dot(table, indices, cotangent)
    d_table = None
    if "table" in wanted:
        rows = RowGradient(indices, weights, cotangent).dense(table.shape[0]).astype(table.dtype)
        d_table = dataclasses.replace(table, rows=rows)
    return d_table, None, d_weights.astype(weights.dtype)


_bag.defvjp(_bag_forward, _bag_backward, symbolic_zeros=True)
