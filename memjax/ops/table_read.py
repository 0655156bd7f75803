"""The two reads of a table, bag and dot: each is the transpose of the other in its per-token factor."""

import dataclasses
import math
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from memjax.config import checks
from memjax.ops import dispatch
from memjax.ops.manual_axes import vary_together
from memjax.ops.row_gradient import RowGradient
from memjax.ops.shapes import in_range
from memjax.ops.table import Table, differentiable

SAVED_NAMES = {"embedding_bag": "memory_bag", "embedding_dot": "memory_dot"}
"""`checkpoint_name` of each operation's output, so that rematerialisation can keep it."""

IndexMode = Literal["fill", "promise_in_bounds"]
"""Indices outside the table read NaN, or the caller promises that there are none (`jax.lax.GatherScatterMode`)."""


def read(
    operation: str,
    name: str,
    table: Table,
    indices: Int[Array, "*t k"],
    factor: Float[Array, "*t _"],
    mode: IndexMode,
) -> tuple[Float[Array, "t _"], Bool[Array, "t k"] | None]:
    """The operation's result with batch axes folded, and a mask of the indices in range.

    The mask is None if the mode promises that all are. Indices out of range read row 0.

    Raises:
        ValueError: the mode is unknown.
    """
    checks.refuse(checks.one_of(get_args(IndexMode), mode=mode))
    tokens = math.prod(indices.shape[:-1])
    indices, factor = indices.reshape(tokens, -1), factor.reshape(tokens, -1)
    exist = None if mode == "promise_in_bounds" else in_range(indices, table.shape[0])
    # Indexing compares with the number of rows, which a narrow type may not be able to represent.
    indices = indices.astype(jnp.int32)
    arguments = vary_together((table, indices if exist is None else jnp.where(exist, indices, 0), factor))
    try:
        return _read(operation, name, *arguments), exist
    except NotImplementedError as error:
        if "symbolic_zeros" not in str(error):
            raise
        # A jax.shard_map that is not compiled. Always compiling would make remat treat every table as differentiated.
        return jax.jit(_read, static_argnums=(0, 1))(operation, name, *arguments), exist


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read(operation: str, name: str, table: Table, indices: Array, factor: Array) -> Array:
    return getattr(dispatch.load(operation, name), operation)(table, indices, factor)


def _forward(operation, name, table, indices, factor):
    # The tuple's length is part of the residuals' structure: a flag that stays static under jit.
    wanted = ("table",) if differentiable(operation, table) else ()
    table = jax.tree.map(lambda leaf: leaf.value, table)
    out = _read(operation, name, table, indices.value, factor.value)
    return checkpoint_name(out, SAVED_NAMES[operation]), (table, indices.value, factor.value, dict.fromkeys(wanted))


def _backward(operation, name, residuals, cotangent):
    table, indices, factor, wanted = residuals
    # Each operation's transpose in its factor is the other one: the same rows, read with the cotangent.
    (transpose,) = SAVED_NAMES.keys() - {operation}
    d_factor = getattr(dispatch.load(transpose, name), transpose)(table, indices, cotangent)
    d_table = None
    if "table" in wanted:
        weights, vectors = (factor, cotangent) if operation == "embedding_bag" else (cotangent, factor)
        rows = RowGradient(indices, weights, vectors).dense(table.shape[0]).astype(table.dtype)
        d_table = dataclasses.replace(table, rows=rows)
    return d_table, None, d_factor.astype(factor.dtype)


_read.defvjp(_forward, _backward, symbolic_zeros=True)
