"""Decode attention as a Triton kernel: the filled part of a row's cache is cut into pieces, a program for each.

A program forms the softmax of its piece in one pass (arXiv:2205.14135); XLA then weighs the pieces, so that few rows
with long caches fill a GPU as well (flash-decoding).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import tiles, triton_call

_PROGRAMS = 512
"""Enough of them to fill a GPU of about 130 multiprocessors."""


@triton.jit
def piece_kernel(
    query_ptr, keys_ptr, values_ptr, lengths_ptr, out_ptr, highest_ptr, total_ptr, SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of a row's cache for the heads of a group: the weighted sum, its highest score, the sum of weights.

    HEADS and COLUMNS are GROUP and WIDTH rounded up to what matrix products take.
    """
    row, kv_head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    end = tl.load(lengths_ptr + row)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(end - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(end - begin, PIECES), BLOCK) * BLOCK
    first = begin + piece * share
    last = tl.minimum(first + share, end)

    head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    is_head, is_column = head < GROUP, column < WIDTH
    own = (row * KV_HEADS + kv_head) * GROUP + head
    query = tl.load(
        query_ptr + own[:, None] * WIDTH + column[None, :], mask=is_head[:, None] & is_column[None, :], other=0.0
    )
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    out = tl.zeros((HEADS, COLUMNS), tl.float32)
    cache = (row * KV_HEADS + kv_head) * SIZE * WIDTH
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        is_place = place < last
        at = cache + place[:, None] * WIDTH + column[None, :]
        inside = is_place[:, None] & is_column[None, :]
        keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * SCALE
        scores = tl.where(is_place[None, :], scores, float("-inf"))
        # The first place of a block is always filled, so this is a number.
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(highest - higher)
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
        out = out * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * fade + tl.sum(weights, axis=1)
        highest = higher
    at = own * PIECES + piece
    tl.store(highest_ptr + at, highest, mask=is_head)
    tl.store(total_ptr + at, total, mask=is_head)
    tl.store(out_ptr + at[:, None] * WIDTH + column[None, :], out, mask=is_head[:, None] & is_column[None, :])


def decode_attention(
    query: Float[Array, "b n h"],
    keys: Float[Array, "b kv s h"],
    values: Float[Array, "b kv s h"],
    lengths: Int[Array, " b"],
    window: int | None,
) -> Float[Array, "b n h"]:
    """Reads only what each row's cache holds."""
    (batch, heads, width), (kv_heads, size) = query.shape, keys.shape[1:3]
    keys, values = keys.astype(query.dtype), values.astype(query.dtype)
    block = 64 if width <= 128 and query.dtype.itemsize <= 2 else 32
    longest = size if window is None else min(size, window)
    pieces = min(tiles.ceil_div(longest, block), max(1, _PROGRAMS // (batch * kv_heads)))
    narrow = jax.ShapeDtypeStruct((batch, heads, pieces), jnp.float32)
    out, highest, total = triton_call.launch(
        piece_kernel,
        query,
        keys,
        values,
        lengths.astype(jnp.int32),
        out=[jax.ShapeDtypeStruct((batch, heads, pieces, width), jnp.float32), narrow, narrow],
        grid=(batch, kv_heads, pieces),
        num_warps=4,
        num_stages=3,
        SIZE=size,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        WIDTH=width,
        PIECES=pieces,
        WINDOW=window or 0,
        SCALE=width**-0.5,
        HEADS=max(16, tiles.next_power_of_two(heads // kv_heads)),
        COLUMNS=max(16, tiles.next_power_of_two(width)),
        BLOCK=block,
    )
    share = jnp.exp(highest - jnp.max(highest, axis=-1, keepdims=True))
    summed = jnp.sum(out * share[..., None], axis=2) / jnp.sum(total * share, axis=-1)[..., None]
    return summed.astype(query.dtype)
