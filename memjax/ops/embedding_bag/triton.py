"""The embedding bag as a Triton kernel: a program for every token and slice of columns, many rows in flight."""

import jax
import triton
import triton.language as tl
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from memjax.ops import tiles, triton_call


@triton.jit
def bag_kernel(
    table_ptr,
    indices_ptr,
    weights_ptr,
    out_ptr,
    DIM: tl.constexpr,
    PICKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """COLUMNS columns of a token's bag, ROWS picks at a time."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < DIM
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, PICKS, ROWS):
        pick = first + tl.arange(0, ROWS)
        valid = pick < PICKS
        # 64-bit: row * DIM passes 2**31 in tables that fit on one GPU.
        row = tl.load(indices_ptr + token * PICKS + pick, mask=valid, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + token * PICKS + pick, mask=valid, other=0.0).to(tl.float32)
        values = tl.load(
            table_ptr + row[:, None] * DIM + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(values * weight[:, None], axis=0)
    tl.store(out_ptr + token * DIM + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@sequential_vmap
def embedding_bag(
    table: Float[Array, "n d"], indices: Int[Array, "t k"], weights: Float[Array, "t k"]
) -> Float[Array, "t d"]:
    """The reference's sum, in float32."""
    (tokens, picks), dim = indices.shape, table.shape[1]
    tile = tiles.embedding_bag(dim, picks, table.dtype.itemsize)
    (out,) = triton_call.launch(
        bag_kernel,
        table,
        indices,
        weights,
        out=[jax.ShapeDtypeStruct((tokens, dim), table.dtype)],
        grid=(tokens, tiles.ceil_div(dim, tile.columns)),
        num_warps=tile.num_warps,
        DIM=dim,
        PICKS=picks,
        COLUMNS=tile.columns,
        ROWS=tile.rows,
    )
    return out
