"""The embedding bag as a Triton kernel: one program per token and slice of columns, with many rows in flight."""

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.row_formats.triton import launch_read, rows_in_host_memory
from memjax.ops.table import Table
from memjax.ops.tiles import ceil_div


@triton.jit
def bag_kernel(
    rows_ptr,
    scales_ptr,
    indices_ptr,
    weights_ptr,
    out_ptr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PICKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    READ: tl.constexpr,
    PINNED: tl.constexpr,
):
    """COLUMNS columns of a token's bag, ROWS picks at a time."""
    if PINNED is not None:
        rows_ptr = rows_in_host_memory(rows_ptr, PINNED)
    token = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, PICKS, ROWS):
        pick = first + tl.arange(0, ROWS)
        valid = pick < PICKS
        # 64-bit: row * DIM passes 2**31 in tables that fit on one GPU.
        row = tl.load(indices_ptr + token * PICKS + pick, mask=valid, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + token * PICKS + pick, mask=valid, other=0.0).to(tl.float32)
        values = READ(rows_ptr, scales_ptr, row, first_column, valid, DIM, GROUP, COLUMNS)
        total += tl.sum(values * weight[:, None], axis=0)
    tl.store(out_ptr + token * DIM + columns, total.to(out_ptr.dtype.element_ty), mask=columns < DIM)


@triton_call.sequential
def embedding_bag(
    table: Table | Float[Array, "n d"], indices: Int[Array, "t k"], weights: Float[Array, "t k"]
) -> Float[Array, "t d"]:
    """The reference's sum, in float32."""
    table = Table.of(table)
    out = jax.ShapeDtypeStruct((indices.shape[0], table.shape[1]), table.dtype)
    programs = lambda tile: ceil_div(table.shape[1], tile.columns)
    return launch_read("embedding_bag", bag_kernel, table, indices, weights, out=out, programs=programs)
