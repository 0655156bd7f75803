"""The product of a matrix and a vector as a Triton kernel: a few rows for each program, all loads under way at once."""

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float

from memjax.ops import tiles, triton_call

_ROWS = 4
"""Rows of a program: few, as a matrix of 1,024 rows has to keep all multiprocessors busy."""
_COLUMNS = 1024


@triton.jit
def matvec_kernel(
    x_ptr, rows_ptr, residual_ptr, out_ptr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GATED: tl.constexpr,
    ADDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs, summed in float32, COLUMNS inputs at a time; with GATED each has two rows of the matrix."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < OUTPUTS
    # 64 bits: the matrix of a large vocabulary has more entries than 32 can count.
    at = row.to(tl.int64)[:, None] * INPUTS + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, INPUTS, COLUMNS):
        is_column = column < INPUTS - first
        inside = is_row[:, None] & is_column[None, :]
        x = tl.load(x_ptr + first + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        total += tl.load(rows_ptr + at + first, mask=inside, other=0.0).to(tl.float32) * x
        if GATED:
            up_at = at + OUTPUTS * INPUTS + first
            total_up += tl.load(rows_ptr + up_at, mask=inside, other=0.0).to(tl.float32) * x
    dtype = out_ptr.dtype.element_ty
    out = tl.sum(total, axis=1).to(dtype)
    if GATED:
        gate = out.to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(dtype)
        out = (silu.to(tl.float32) * tl.sum(total_up, axis=1).to(dtype).to(tl.float32)).to(dtype)
    if ADDS:
        residual = tl.load(residual_ptr + row, mask=is_row, other=0.0).to(tl.float32)
        out = (residual + out.to(tl.float32)).to(dtype)
    tl.store(out_ptr + row, out, mask=is_row)


def matvec(
    x: Float[Array, " k"], rows: Float[Array, "n k"], residual: Float[Array, " m"] | None, gated: bool
) -> Float[Array, " m"]:
    """Reads the matrix once, at the pace of the memory."""
    (outputs, inputs) = rows.shape
    outputs = outputs // 2 if gated else outputs
    (out,) = triton_call.launch(
        matvec_kernel,
        x,
        rows,
        x if residual is None else residual,
        out=[jax.ShapeDtypeStruct((outputs,), x.dtype)],
        grid=(tiles.ceil_div(outputs, _ROWS),),
        num_warps=4,
        INPUTS=inputs,
        OUTPUTS=outputs,
        GATED=gated,
        ADDS=residual is not None,
        ROWS=_ROWS,
        COLUMNS=min(_COLUMNS, max(16, tiles.next_power_of_two(inputs))),
    )
    return out
