"""RMSNorm and its gradient as Triton kernels: every row is read once."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from memjax.ops import triton_call
from memjax.ops.rms_norm import tiles
from memjax.ops.tiles import ceil_div

STRIP = 32
"""Rows per program of the gradient: enough to keep the partial sums of d_scale few, but few enough to fill a GPU."""


@triton.jit
def norm_kernel(
    x_ptr, scale_ptr, y_ptr, TOKENS: tl.constexpr, DIM: tl.constexpr, EPSILON: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Normalises ROWS whole rows; WIDTH is DIM rounded up to a power of two."""
    place, inside, column = whole_rows(TOKENS, DIM, WIDTH, ROWS)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y = normed(x, scale_ptr, column, DIM, EPSILON)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def added_norm_kernel(
    x_ptr, residual_ptr, scale_ptr, added_ptr, y_ptr, TOKENS: tl.constexpr, DIM: tl.constexpr, EPSILON: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`norm_kernel` for the sum of two arrays, which it also writes."""
    place, inside, column = whole_rows(TOKENS, DIM, WIDTH, ROWS)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    # Rounded first, so that the norm is that of the sum which later layers read.
    added = x.to(added_ptr.dtype.element_ty)
    tl.store(added_ptr + place, added, mask=inside)
    y = normed(added.to(tl.float32), scale_ptr, column, DIM, EPSILON)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def whole_rows(TOKENS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of a program's rows, a mask of those that exist, and the columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    place = row[:, None] * DIM + column[None, :]
    return place, (row < TOKENS)[:, None] & (column < DIM)[None, :], column


@triton.jit
def normed(x, scale_ptr, column, DIM: tl.constexpr, EPSILON: tl.constexpr):
    """Rows divided by their root mean square, times the scale."""
    scale = tl.load(scale_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=1) / DIM + EPSILON)
    return x * inverse[:, None] * scale[None, :]


@triton.jit
def norm_gradient_kernel(
    x_ptr, scale_ptr, d_y_ptr, d_residual_ptr, d_x_ptr, d_scale_ptr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    EPSILON: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """STRIP rows, ROWS at a time; their sum of d_scale stays in registers."""
    strip = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    scale = tl.load(scale_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    d_scale = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, STRIP, ROWS):
        row = strip.to(tl.int64) * STRIP + first + tl.arange(0, ROWS)
        place = row[:, None] * DIM + column[None, :]
        inside = (row < TOKENS)[:, None] & (column < DIM)[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_residual = tl.load(d_residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        inverse = 1 / tl.sqrt(tl.sum(x * x, axis=1) / DIM + EPSILON)
        normed = x * inverse[:, None]
        d_normed = d_y * scale[None, :]
        along = tl.sum(d_normed * normed, axis=1) / DIM
        d_x = d_residual + (d_normed - normed * along[:, None]) * inverse[:, None]
        tl.store(d_x_ptr + place, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
        d_scale += tl.sum(d_y * normed, axis=0)
    tl.store(d_scale_ptr + strip * DIM + column, d_scale, mask=column < DIM)


def rms_norm(x: Float[Array, "t d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "t d"]:
    """The reference's formula, in float32."""
    (y,) = _norm(x, scale, epsilon=epsilon)
    return y


def added_rms_norm(
    x: Float[Array, "t d"], residual: Float[Array, "t d"], scale: Float[Array, " d"], epsilon: float
) -> tuple[Float[Array, "t d"], Float[Array, "t d"]]:
    """x plus the residual, and its norm."""
    added, y = _norm(x, residual, scale, epsilon=epsilon)
    return added, y


@triton_call.sequential
def rms_norm_gradient(
    x: Float[Array, "t d"],
    scale: Float[Array, " d"],
    d_y: Float[Array, "t d"],
    d_residual: Float[Array, "t d"],
    *,
    epsilon: float,
) -> tuple[Float[Array, "t d"], Float[Array, " d"]]:
    """The gradient with respect to x, plus that of the residual, and the gradient with respect to scale (float32)."""
    tokens, dim = x.shape
    tile = tiles.rms_norm_gradient(dim)
    strips = ceil_div(tokens, STRIP)
    d_x, d_scale = triton_call.launch(
        norm_gradient_kernel,
        x,
        scale,
        d_y,
        d_residual,
        out=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((strips, dim), jnp.float32)],
        grid=(strips,),
        num_warps=tile.num_warps,
        TOKENS=tokens,
        DIM=dim,
        EPSILON=epsilon,
        WIDTH=tile.columns,
        ROWS=tile.rows,
        STRIP=STRIP,
    )
    return d_x, d_scale.sum(axis=0)


@triton_call.sequential
def _norm(*arrays: Array, epsilon: float) -> tuple[Array, ...]:
    """Norm of x with scale, or of x + residual with scale."""
    x, adds = arrays[0], len(arrays) == 3
    tokens, dim = x.shape
    tile = tiles.rms_norm(dim)
    outputs = triton_call.launch(
        added_norm_kernel if adds else norm_kernel,
        *arrays,
        out=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * (2 if adds else 1),
        grid=(ceil_div(tokens, tile.rows),),
        num_warps=tile.num_warps,
        TOKENS=tokens,
        DIM=dim,
        EPSILON=epsilon,
        WIDTH=tile.columns,
        ROWS=tile.rows,
    )
    return tuple(outputs)
