"""Decode attention as a Triton kernel: the filled part of a row's cache is cut into pieces, with one program for each.

A program forms the softmax of its piece in one pass (arXiv:2205.14135). If there are enough rows and heads to fill a
GPU, a row is one piece; otherwise a second kernel combines its pieces, so that few rows with long caches fill a GPU as
well (flash-decoding).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.decode_attention import tiles
from memjax.ops.decode_attention.tiles import Tile
from memjax.ops.tiles import ceil_div, next_power_of_two


@triton.jit
def _attend(
    query, keys_ptr, values_ptr, cache, first, last, column, highest, total, out, WIDTH: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a cache's entries first..last to the highest score, the sum of weights and the weighted sum."""
    is_column = column < WIDTH
    for start in range(first, last, BLOCK):
        position = start + tl.arange(0, BLOCK)
        is_position = position < last
        at = cache + position[:, None] * WIDTH + column[None, :]
        inside = is_position[:, None] & is_column[None, :]
        keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * SCALE
        scores = tl.where(is_position[None, :], scores, float("-inf"))
        # The first position of a block is always filled, so this is not -inf.
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(highest - higher)
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
        out = out * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * fade + tl.sum(weights, axis=1)
        highest = higher
    return highest, total, out


@triton.jit
def _store(
    out_ptr, highest_ptr, total_ptr, own, piece, is_head, column, highest, total, out, WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Writes the result of a row that is one piece, or what is needed to combine several."""
    at = own * PIECES + piece
    if PIECES == 1:
        out = out / total[:, None]
    else:
        tl.store(highest_ptr + at, highest, mask=is_head)
        tl.store(total_ptr + at, total, mask=is_head)
    inside = is_head[:, None] & (column < WIDTH)[None, :]
    tl.store(out_ptr + at[:, None] * WIDTH + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def step_kernel(
    joined_ptr, keys_ptr, values_ptr, positions_ptr, cos_ptr, sin_ptr, out_ptr, highest_ptr, total_ptr, new_keys_ptr,
    new_values_ptr, SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    PIECES: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of a group's heads over one piece of a row's cache: weighted sum, highest score and sum of weights.

    Queries and the new key are rotated first. The first piece starts with the new entry in registers, and writes it; no
    program reads it from the cache. HEADS and COLUMNS are GROUP and WIDTH rounded up to what tl.dot accepts.
    """
    row, kv_head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    own_position = tl.load(positions_ptr + row)
    filled = tl.minimum(own_position, SIZE)
    # Columns of the new entry that this program starts with and writes: all or none.
    entry_width = tl.where((own_position < SIZE) & (piece == 0), COLUMNS, 0)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(tl.minimum(own_position + 1, SIZE) - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(filled - begin, PIECES), BLOCK) * BLOCK
    first = begin + piece * share
    last = tl.minimum(first + share, filled)

    HALF: tl.constexpr = WIDTH // 2
    head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    is_head, is_column = head < GROUP, column < WIDTH
    inside = is_head[:, None] & is_column[None, :]
    joined = joined_ptr + row * (KV_HEADS * (GROUP + 2) * WIDTH)
    query_at = joined + (kv_head * GROUP + head)[:, None] * WIDTH
    key_at = joined + (KV_HEADS * GROUP + kv_head) * WIDTH
    value_at = joined + (KV_HEADS * (GROUP + 1) + kv_head) * WIDTH
    query = tl.load(query_at + column[None, :], mask=inside, other=0.0)
    key = tl.load(key_at + column, mask=is_column, other=0.0)
    value = tl.load(value_at + column, mask=is_column, other=0.0)
    if TURNED:
        is_front = column < HALF
        other = tl.where(is_front, column + HALF, column - HALF)
        angle = row * HALF + tl.where(is_front, column, column - HALF)
        cos = tl.load(cos_ptr + angle, mask=is_column, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=is_column, other=0.0).to(tl.float32)
        sin = tl.where(is_front, -sin, sin)
        other_query = tl.load(query_at + other[None, :], mask=inside, other=0.0).to(tl.float32)
        other_key = tl.load(key_at + other, mask=is_column, other=0.0).to(tl.float32)
        query = (query.to(tl.float32) * cos[None, :] + other_query * sin[None, :]).to(query.dtype)
        key = (key.to(tl.float32) * cos + other_key * sin).to(key.dtype)

    cache = (row * KV_HEADS + kv_head) * SIZE * WIDTH
    at = cache + own_position * WIDTH + column
    is_written = is_column & (column < entry_width)
    tl.store(new_keys_ptr + at, key, mask=is_written)
    tl.store(new_values_ptr + at, value, mask=is_written)

    score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * SCALE
    has_entry = tl.zeros((HEADS,), tl.int32) < entry_width
    highest = tl.where(has_entry, score, float("-inf"))
    total = tl.where(has_entry, 1.0, 0.0)
    out = tl.where(has_entry[:, None], value.to(tl.float32)[None, :], 0.0)
    highest, total, out = _attend(
        query, keys_ptr, values_ptr, cache, first, last, column, highest, total, out, WIDTH, SCALE, BLOCK
    )
    own = (row * KV_HEADS + kv_head) * GROUP + head
    _store(out_ptr, highest_ptr, total_ptr, own, piece, is_head, column, highest, total, out, WIDTH, PIECES)


@triton.jit
def weigh_kernel(
    pieces_ptr, highest_ptr, total_ptr, out_ptr, PIECES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Combines the pieces of a row and head; PADDED and COLUMNS are PIECES and WIDTH rounded up to powers of two."""
    head = tl.program_id(0).to(tl.int64)
    piece, column = tl.arange(0, PADDED), tl.arange(0, COLUMNS)
    is_piece, is_column = piece < PIECES, column < WIDTH
    at = head * PIECES + piece
    highest = tl.load(highest_ptr + at, mask=is_piece, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=is_piece, other=0.0)
    inside = is_piece[:, None] & is_column[None, :]
    pieces = tl.load(pieces_ptr + at[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    share = tl.exp(highest - tl.max(highest, axis=0))
    out = tl.sum(pieces * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(out_ptr + head * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=is_column)


def decode_step(
    joined: Float[Array, "b width"],
    keys: Float[Array, "b kv s h"],
    values: Float[Array, "b kv s h"],
    positions: Int[Array, " b"],
    rotation: tuple[Float[Array, "b half"], Float[Array, "b half"]] | None,
    window: int | None,
    *,
    tile: Tile | None = None,
) -> tuple[Float[Array, "b n h"], Float[Array, "b kv s h"], Float[Array, "b kv s h"]]:
    """One kernel rotates, writes the new entries and attends; the cache is updated in place."""
    (batch, kv_heads, size, width), dtype = keys.shape, joined.dtype
    heads = joined.shape[1] // width - 2 * kv_heads
    tile = tile or tiles.default_tile(width, dtype.itemsize)
    longest = size if window is None else min(size, window)
    pieces = min(ceil_div(longest, tile.block), max(1, tile.programs // (batch * kv_heads)))
    narrow = jax.ShapeDtypeStruct((batch, heads, pieces), jnp.float32)
    wide = jax.ShapeDtypeStruct((batch, heads, pieces, width), dtype if pieces == 1 else jnp.float32)
    out, highest, total, keys, values = triton_call.launch(
        step_kernel,
        *(joined, keys, values, positions),
        *(rotation or (positions, positions)),
        out=[wide, narrow, narrow, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (keys, values))],
        grid=(batch, kv_heads, pieces),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aliases={1: 3, 2: 4},
        SIZE=size,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        WIDTH=width,
        PIECES=pieces,
        WINDOW=window or 0,
        SCALE=width**-0.5,
        TURNED=rotation is not None,
        HEADS=max(16, next_power_of_two(heads // kv_heads)),
        COLUMNS=max(16, next_power_of_two(width)),
        BLOCK=tile.block,
    )
    if pieces == 1:
        return out[:, :, 0], keys, values
    (summed,) = triton_call.launch(
        weigh_kernel,
        out,
        highest,
        total,
        out=[jax.ShapeDtypeStruct((batch, heads, width), dtype)],
        grid=(batch * heads,),
        num_warps=4,
        PIECES=pieces,
        WIDTH=width,
        PADDED=next_power_of_two(pieces),
        COLUMNS=next_power_of_two(width),
    )
    return summed, keys, values
