"""The matrix-vector product as a Triton kernel: a few rows per program, all loads in flight at once."""

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float

from memjax.ops import tiles, triton_call

_ROWS = 4
"""Rows per program: few, because a matrix of 1,024 rows must keep all multiprocessors busy."""
_COLUMNS = 1024


@triton.jit
def matvec_kernel(
    x_ptr, rows_ptr, residual_ptr, bias_ptr, input_gate_ptr, out_ptr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    GATED: tl.constexpr, ADDS: tl.constexpr, BIASED: tl.constexpr, INPUT_GATED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs, summed in float32, COLUMNS inputs at a time; with GATED, each takes two rows of the matrix."""
    dtype = out_ptr.dtype.element_ty
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
        x = tl.load(x_ptr + first + column, mask=is_column, other=0.0).to(tl.float32)
        if INPUT_GATED:
            gate = tl.load(input_gate_ptr + first + column, mask=is_column, other=0.0)
            x = (x * silu(gate).to(tl.float32)).to(dtype).to(tl.float32)
        x = x[None, :]
        total += tl.load(rows_ptr + at + first, mask=inside, other=0.0).to(tl.float32) * x
        if GATED:
            up_at = at + OUTPUTS * INPUTS + first
            total_up += tl.load(rows_ptr + up_at, mask=inside, other=0.0).to(tl.float32) * x
    out = tl.sum(total, axis=1).to(dtype)
    if BIASED:
        out = add(out, bias_ptr + row, is_row)
    if GATED:
        up = tl.sum(total_up, axis=1).to(dtype)
        if BIASED:
            up = add(up, bias_ptr + OUTPUTS + row, is_row)
        out = (silu(out).to(tl.float32) * up.to(tl.float32)).to(dtype)
    if ADDS:
        out = add(out, residual_ptr + row, is_row)
    tl.store(out_ptr + row, out, mask=is_row)


@triton.jit
def silu(gate):
    """gate * sigmoid(gate), in gate's type."""
    wide = gate.to(tl.float32)
    return (wide / (1 + tl.exp(-wide))).to(gate.dtype)


@triton.jit
def add(out, pointers, mask):
    """out plus the stored numbers, in out's type."""
    stored = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return (stored + out.to(tl.float32)).to(out.dtype)


def matvec(
    x: Float[Array, " k"],
    rows: Float[Array, "n k"],
    residual: Float[Array, " m"] | None,
    bias: Float[Array, " n"] | None,
    input_gate: Float[Array, " k"] | None,
    gated: bool,
) -> Float[Array, " m"]:
    """Reads the matrix once, at memory bandwidth."""
    (outputs, inputs) = rows.shape
    outputs = outputs // 2 if gated else outputs
    (out,) = triton_call.launch(
        matvec_kernel,
        x,
        rows,
        # Every pointer must be given; those of absent arrays are not read.
        *(x if array is None else array for array in (residual, bias, input_gate)),
        out=[jax.ShapeDtypeStruct((outputs,), x.dtype)],
        grid=(tiles.ceil_div(outputs, _ROWS),),
        num_warps=4,
        INPUTS=inputs,
        OUTPUTS=outputs,
        GATED=gated,
        ADDS=residual is not None,
        BIASED=bias is not None,
        INPUT_GATED=input_gate is not None,
        ROWS=_ROWS,
        COLUMNS=min(_COLUMNS, max(16, tiles.next_power_of_two(inputs))),
    )
    return out
