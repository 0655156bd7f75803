"""The embedding dot as a Triton kernel: one program per token and group of picks, with a tile of rows in flight."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.row_formats.triton import launch_read, rows_in_host_memory
from memjax.ops.table import Table
from memjax.ops.tiles import ceil_div


@triton.jit
def dot_kernel(
    rows_ptr,
    scales_ptr,
    indices_ptr,
    vectors_ptr,
    out_ptr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PICKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    READ: tl.constexpr,
    PINNED: tl.constexpr,
):
    """The products of ROWS picks of a token, COLUMNS columns at a time."""
    if PINNED is not None:
        rows_ptr = rows_in_host_memory(rows_ptr, PINNED)
    token = tl.program_id(0).to(tl.int64)
    pick = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = pick < PICKS
    row = tl.load(indices_ptr + token * PICKS + pick, mask=valid, other=0).to(tl.int64)
    # Each thread sums the neighbouring columns that it has loaded; threads exchange sums only once, at the end.
    total = tl.zeros((ROWS, COLUMNS // 8), tl.float32)
    for first in range(0, DIM, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        vector = tl.load(vectors_ptr + token * DIM + columns, mask=columns < DIM, other=0.0).to(tl.float32)
        values = READ(rows_ptr, scales_ptr, row, first, valid, DIM, GROUP, COLUMNS)
        total += tl.sum(tl.reshape(values * vector[None, :], [ROWS, COLUMNS // 8, 8]), axis=2)
    tl.store(out_ptr + token * PICKS + pick, tl.sum(total, axis=1), mask=valid)


@triton_call.sequential
def embedding_dot(
    table: Table | Float[Array, "n d"], indices: Int[Array, "t k"], vectors: Float[Array, "t d"]
) -> Float[Array, "t k"]:
    """The reference's products, in float32."""
    out = jax.ShapeDtypeStruct(indices.shape, jnp.float32)
    programs = lambda tile: ceil_div(indices.shape[1], tile.rows)
    return launch_read("embedding_dot", dot_kernel, Table.of(table), indices, vectors, out=out, programs=programs)
