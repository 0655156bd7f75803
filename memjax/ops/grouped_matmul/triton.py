"""The grouped matmul as Triton kernels: tiles of rows, each of one group, scheduled on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.grouped_matmul import tiles
from memjax.ops.tiles import ceil_div


class Schedule(NamedTuple):
    """Which rows each program multiplies, and with which matrix.

    The number of tiles that the groups fill is known only on the device: there are enough for the worst case, and those
    left over have no rows.
    """

    group: Int[Array, " tiles"]
    begin: Int[Array, " tiles"]
    end: Int[Array, " tiles"]
    """One past the last row of the tile's group; later rows belong to other groups."""


def schedule(sizes: Int[Array, " g"], num_rows: int, rows: int) -> Schedule:
    """Tiles of at most `rows` rows that together hold every row once."""
    ends = jnp.cumsum(sizes)
    tiles_of = (sizes + rows - 1) // rows
    last = jnp.cumsum(tiles_of)
    tile = jnp.arange(ceil_div(num_rows, rows) + sizes.shape[0])
    group = jnp.minimum(jnp.searchsorted(last, tile, side="right"), sizes.shape[0] - 1)
    begin = ends[group] - sizes[group] + (tile - last[group] + tiles_of[group]) * rows
    return Schedule(*(part.astype(jnp.int32) for part in (group, begin, ends[group])))


@triton.jit
def rows_kernel(
    rows_ptr,
    matrices_ptr,
    group_ptr,
    begin_ptr,
    end_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    STEP_K: tl.constexpr,
    STEP_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS rows of a group times COLUMNS columns of its matrix, INNER summands at a time."""
    tile = tl.program_id(1)
    begin, end = tl.load(begin_ptr + tile), tl.load(end_ptr + tile)
    if begin < end:
        row = begin + tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = (row < end)[:, None], (column < N)[None, :]
        inner = tl.arange(0, INNER)
        # 64-bit: rows times columns passes 2**31 where many tokens meet a wide expert.
        left = rows_ptr + row.to(tl.int64)[:, None] * K + inner[None, :]
        right = matrices_ptr + tl.load(group_ptr + tile).to(tl.int64) * K * N
        right += inner[:, None] * STEP_K + column[None, :] * STEP_N
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, K, INNER):
            a = tl.load(left + first, mask=is_row & (first + inner < K)[None, :], other=0.0)
            b = tl.load(right + first * STEP_K, mask=(first + inner < K)[:, None] & is_column, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        out = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def matrices_kernel(
    rows_ptr,
    cotangent_ptr,
    begin_ptr,
    end_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS x COLUMNS of the gradient of a group's matrix: a sum over the group's rows, INNER at a time.

    STEPS is for the interpreter, which cannot load loop bounds: the most steps that a group may need. Otherwise it is
    0.
    """
    group = tl.program_id(2).to(tl.int64)
    begin, end = tl.load(begin_ptr + group), tl.load(end_ptr + group)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = (row < K)[None, :], (column < N)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, STEPS if STEPS > 0 else tl.cdiv(end - begin, INNER)):
        inner = begin + step * INNER + tl.arange(0, INNER)
        place, inside = inner.to(tl.int64)[:, None], (inner < end)[:, None]
        a = tl.load(rows_ptr + place * K + row[None, :], mask=inside & is_row, other=0.0)
        b = tl.load(cotangent_ptr + place * N + column[None, :], mask=inside & is_column, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    out = out_ptr + group * K * N + row[:, None] * N + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < K)[:, None] & is_column)


@triton_call.sequential
def grouped_matmul(
    rows: Float[Array, "m k"], matrices: Float[Array, "g ..."], sizes: Int[Array, " g"], *, transposed: bool = False
) -> Float[Array, "m n"]:
    """The reference's products, summed in float32; matrices are read transposed, not copied."""
    sizes = _inside(sizes, rows.shape[0])
    (num_rows, inputs), outputs = rows.shape, matrices.shape[1 if transposed else 2]
    tile = tiles.grouped_matmul(num_rows // sizes.shape[0], outputs, inputs, rows.dtype.itemsize)
    work = schedule(sizes, num_rows, tile.rows)
    (out,) = triton_call.launch(
        rows_kernel,
        rows,
        matrices,
        *work,
        out=[jax.ShapeDtypeStruct((num_rows, outputs), rows.dtype)],
        grid=(ceil_div(outputs, tile.columns), work.group.shape[0]),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        K=inputs,
        N=outputs,
        STEP_K=1 if transposed else outputs,
        STEP_N=inputs if transposed else 1,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        PRECISION=_precision(rows),
    )
    return out


@triton_call.sequential
def matrices_gradient(
    rows: Float[Array, "m k"], cotangent: Float[Array, "m n"], sizes: Int[Array, " g"]
) -> Float[Array, "g k n"]:
    """The reference's sums, in float32."""
    sizes = _inside(sizes, rows.shape[0])
    (num_rows, inputs), outputs, groups = rows.shape, cotangent.shape[1], sizes.shape[0]
    tile = tiles.grouped_matmul_gradient(inputs, outputs, num_rows // groups, rows.dtype.itemsize)
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    (out,) = triton_call.launch(
        matrices_kernel,
        rows,
        cotangent,
        ends - sizes.astype(jnp.int32),
        ends,
        out=[jax.ShapeDtypeStruct((groups, inputs, outputs), rows.dtype)],
        grid=(ceil_div(outputs, tile.columns), ceil_div(inputs, tile.rows), groups),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        K=inputs,
        N=outputs,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        STEPS=ceil_div(num_rows, tile.inner) if triton_call.is_interpreted() else 0,
        PRECISION=_precision(rows),
    )
    return out


def _inside(sizes: Array, num_rows: int) -> Array:
    """The sizes without rows beyond num_rows, which must be neither read nor written."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(sizes, 0)), num_rows)
    return jnp.diff(ends, prepend=0)


def _precision(rows: Array) -> str:
    """float32 factors are not rounded to TF32; others are exact in it."""
    return "ieee" if rows.dtype == jnp.float32 else "tf32"
