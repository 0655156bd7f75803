"""How kernels read rows: a reader for each format, which kernels take as a constant, and the launch of such kernels.

    reader(rows_ptr, scales_ptr, row, first, valid, WIDTH, GROUP, COLUMNS) -> float32[ROWS, COLUMNS]

A reader loads COLUMNS neighbouring columns, from `first` (a multiple of COLUMNS) on, of the rows `row` (int64[ROWS]).
Rows that are not `valid`, and columns from WIDTH on, are 0. GROUP columns share a scale. Readers do not depend on the
kernel, nor kernels on the format.
"""

from collections.abc import Callable
from typing import Any

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import tiles, triton_call
from memjax.ops.table import Table
from memjax.ops.tiles import Tile

ELEMENTS = {
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "int8": tl.int8,
    "uint8": tl.uint8,
    "int16": tl.int16,
    "int32": tl.int32,
    "uint32": tl.uint32,
}
"""Payload types that kernels can read by address."""


def launch_read(
    operation: str,
    kernel: Any,
    table: Table,
    indices: Int[Array, "t k"],
    factor: Float[Array, "t _"],
    *,
    out: jax.ShapeDtypeStruct,
    programs: Callable[[Tile], int],
) -> Array:
    """Runs a kernel that reads `indices` of a table for each token, and multiplies the rows by `factor`.

    Tiles are tuned under the operation's name. The kernel's pointers are rows, scales, indices, factor and out;
    `programs` returns the number of programs per token for a tile.
    """
    (tokens, picks), dim = indices.shape, table.shape[1]
    tile = tiles.of_table_rows(operation, dim, picks, table, tokens)
    (result,) = triton_call.launch(
        kernel,
        table.rows,
        # Every pointer must be given; without scales, this one is not read.
        table.rows if table.scales is None else table.scales,
        indices,
        factor,
        out=[out],
        grid=(tokens, programs(tile)),
        num_warps=tile.num_warps,
        DIM=dim,
        PICKS=picks,
        COLUMNS=tile.columns,
        ROWS=tile.rows,
        GROUP=dim // max(1, table.format.groups(dim)),
        READ=table.format.reader(),
        # The type of the rows, if `rows_ptr` points to their address.
        PINNED=None if table.pinned is None else ELEMENTS[table.format.payload_dtype.name],
    )
    return result


@triton.jit
def rows_in_host_memory(rows_ptr, ELEMENT: tl.constexpr):
    """The pointer to the rows, given a pointer to their address."""
    address = tl.load(rows_ptr.to(tl.pointer_type(tl.int64)))
    # Mapped memory is page-aligned; loads are 16 bytes wide only if the compiler knows that.
    return tl.multiple_of(tl.multiple_of(address, 16).to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def read_plain(
    rows_ptr, scales_ptr, row, first, valid, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr
):
    """Numbers of any type."""
    columns = first + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    return tl.load(
        rows_ptr + row[:, None] * WIDTH + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def read_zeros(
    rows_ptr, scales_ptr, row, first, valid, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr
):
    """Zeros."""
    return tl.zeros((row.shape[0], COLUMNS), tl.float32)


@triton.jit
def read_int8(rows_ptr, scales_ptr, row, first, valid, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes from -127 to 127."""
    codes = load_bytes(rows_ptr, row, first, valid, WIDTH, COLUMNS).to(tl.float32)
    return scaled(codes, scales_ptr, row, first, valid, WIDTH, GROUP, COLUMNS)


@triton.jit
def read_float8(
    rows_ptr, scales_ptr, row, first, valid, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr
):
    """e4m3 numbers, decoded by shifts: not every GPU has an instruction for it."""
    bits = load_bytes(rows_ptr, row, first, valid, WIDTH, COLUMNS).to(tl.int32)
    # Exponent and mantissa are shifted to their places in float32, whose exponent bias is larger by 120. Where the
    # exponent is 0 (subnormal numbers), the mantissa counts steps of 2**-9.
    size = tl.where(
        (bits & 120) == 0,
        (bits & 7).to(tl.float32) * 0.001953125,
        (((bits & 127) << 20) + (120 << 23)).to(tl.float32, bitcast=True),
    )
    return scaled(tl.where(bits < 0, -size, size), scales_ptr, row, first, valid, WIDTH, GROUP, COLUMNS)


@triton.jit
def read_int4(rows_ptr, scales_ptr, row, first, valid, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes from -8 to 7, two in a byte."""
    pairs = load_bytes(rows_ptr, row, first // 2, valid, WIDTH // 2, COLUMNS // 2).to(tl.int32)
    codes = tl.interleave(((pairs << 28) >> 28).to(tl.float32), (pairs >> 4).to(tl.float32))
    return scaled(codes, scales_ptr, row, first, valid, WIDTH, GROUP, COLUMNS)


@triton.jit
def load_bytes(rows_ptr, row, first, valid, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """int8[ROWS, COLUMNS] of rows of WIDTH bytes."""
    columns = first + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    return tl.load(rows_ptr + row[:, None] * WIDTH + columns[None, :], mask=valid[:, None] & inside[None, :], other=0)


@triton.jit
def scaled(codes, scales_ptr, row, first, valid, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """The codes times the scales of their groups; each scale is loaded once where tiles and groups nest."""
    GROUPS: tl.constexpr = WIDTH // GROUP
    if GROUP % COLUMNS == 0:
        scale = tl.load(scales_ptr + row * GROUPS + first // GROUP, mask=valid, other=0.0)
        return codes * scale.to(tl.float32)[:, None]
    if COLUMNS % GROUP == 0 and GROUP & (GROUP - 1) == 0:
        group = first // GROUP + tl.arange(0, COLUMNS // GROUP)
        mask = valid[:, None] & (group < GROUPS)[None, :]
        scale = tl.load(scales_ptr + row[:, None] * GROUPS + group[None, :], mask=mask, other=0.0).to(tl.float32)
        grouped = tl.reshape(codes, [codes.shape[0], COLUMNS // GROUP, GROUP]) * scale[:, :, None]
        return tl.reshape(grouped, [codes.shape[0], COLUMNS])
    columns = first + tl.arange(0, COLUMNS)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    scale = tl.load(scales_ptr + row[:, None] * GROUPS + (columns // GROUP)[None, :], mask=mask, other=0.0)
    return codes * scale.to(tl.float32)
