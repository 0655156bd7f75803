"""The product-key search with Triton kernels around XLA's matrix products.

Half scores, [h, 2, t, n] in float32, come from a matrix product, or for a single token from `score_kernel`, which reads
the keys at memory bandwidth. `select` takes the exact top k of every row; `pair` takes the best k sums of the two
halves.
"""

from functools import partial

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.manual_axes import vary_like
from memjax.ops.precision import accumulator
from memjax.ops.product_key_search import tiles
from memjax.ops.product_key_search.triton_pair import count_pairs, pair
from memjax.ops.product_key_search.triton_select import select
from memjax.ops.product_key_search.xla import chunked, map_chunks, tokens_per_chunk
from memjax.ops.tiles import ceil_div, next_power_of_two

CHUNK_BYTES = 1 << 30
"""Half scores held at once."""
_SCORES = 4096
"""Key elements that a program reads for a single token: 64 bytes per thread if they have 16 bits."""


def product_key_search(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """The reference's slots (equal scores in any order), best first, in chunks of `chunk_bytes` of half scores."""
    search = partial(_search_chunk, keys=keys, top_k=top_k)
    return map_chunks(search, queries, chunk=tokens_per_chunk(chunk_bytes, keys))


def weighted_search(
    queries: Float[Array, "t h key_dim"], keys: Float[Array, "h 2 n half"], top_k: int, scale: float
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """The slots with the softmax of their scaled scores; for few tokens, the search's kernels compute that too."""
    tokens, heads, _ = queries.shape
    if tokens > tokens_per_chunk(CHUNK_BYTES, keys) or not tiles.pair(count_pairs(top_k), tokens * heads).by_rank:
        scores, slots = product_key_search(queries, keys, top_k)
        return jax.nn.softmax(scale * scores, axis=-1), slots
    return _search_chunk(queries, keys, top_k, scale)


def search_gradient(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    indices: Int[Array, "t h k"],
    d_scores: Float[Array, "t h k"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, "t h key_dim"], Float[Array, "h 2 n half"]]:
    """Cotangents of queries and keys: two matrix products with d(half scores), which is in the keys' type."""
    wide = accumulator(keys.dtype)

    def one_chunk(d_keys: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        queries, indices, d_scores = chunk
        d_half = _scatter(indices, d_scores, num_keys=keys.shape[2], dtype=keys.dtype)
        halves = queries.reshape(*queries.shape[:2], 2, -1)
        d_halves = _product("hctn,hcnd->thcd", d_half, keys)
        d_keys += _product("hctn,thcd->hcnd", d_half, halves)
        return d_keys, d_halves.reshape(queries.shape).astype(queries.dtype)

    chunk, zero = tokens_per_chunk(chunk_bytes, keys), vary_like(jnp.zeros(keys.shape, wide), queries)
    if queries.shape[0] <= chunk:
        d_keys, d_queries = one_chunk(zero, (queries, indices, d_scores))
        return d_queries, d_keys.astype(keys.dtype)
    d_keys, d_queries = jax.lax.scan(one_chunk, zero, chunked((queries, indices, d_scores), chunk))
    return d_queries.reshape(-1, *queries.shape[1:])[: queries.shape[0]], d_keys.astype(keys.dtype)


def _search_chunk(queries: Array, keys: Array, top_k: int, scale: float | None = None) -> tuple[Array, Array]:
    if queries.shape[0] == 1:
        scores = _scores_of_one(queries, keys)
    else:
        halves = queries.reshape(*queries.shape[:2], 2, -1)
        scores = _product("thcd,hcnd->hctn", halves, keys)
    best, places = select(scores, top_k=top_k)
    return pair(best, places, num_keys=keys.shape[2], scale=scale)


def _product(subscripts: str, left: Array, right: Array) -> Array:
    """An einsum into float32; float32 factors are not rounded to TF32."""
    if triton_call.is_interpreted():  # XLA's CPU products do not widen bfloat16
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32, precision="highest")


@triton.jit
def score_kernel(
    queries_ptr,
    keys_ptr,
    scores_ptr,
    NUM: tl.constexpr,
    HALF: tl.constexpr,
    ROUND_HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scores of ROWS sub-keys of one head and half for a single token, in float32."""
    part = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, ROUND_HALF)
    inside = (row < NUM)[:, None] & (column < HALF)[None, :]
    query = tl.load(queries_ptr + part * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    place = (part * NUM + row)[:, None] * HALF + column[None, :]
    keys = tl.load(keys_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(scores_ptr + part * NUM + row, tl.sum(keys * query[None, :], axis=1), mask=row < NUM)


@triton_call.sequential
def _scores_of_one(queries: Float[Array, "1 h key_dim"], keys: Float[Array, "h 2 n half"]) -> Float[Array, "h 2 1 n"]:
    """The half scores of a single token."""
    heads, _, num_keys, half_dim = keys.shape
    round_half = next_power_of_two(half_dim)
    rows = max(1, min(_SCORES // round_half, next_power_of_two(num_keys)))
    (scores,) = triton_call.launch(
        score_kernel,
        queries,
        keys,
        out=[jax.ShapeDtypeStruct((heads, 2, 1, num_keys), jnp.float32)],
        grid=(ceil_div(num_keys, rows), 2 * heads),
        num_warps=4,
        NUM=num_keys,
        HALF=half_dim,
        ROUND_HALF=round_half,
        ROWS=rows,
    )
    return scores


@triton.jit
def scatter_kernel(
    slots_ptr,
    d_scores_ptr,
    d_half_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    NUM: tl.constexpr,
    ROUND_NUM: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUND_K: tl.constexpr,
):
    """The row of d(half scores) of a token, head and half: for each sub-key, the sum over its picks, or zero."""
    token, head, half = tl.program_id(0).to(tl.int64), tl.program_id(1) // 2, tl.program_id(1) % 2
    rank = tl.arange(0, ROUND_K)
    kept = rank < TOP_K
    picks = (token * HEADS + head) * TOP_K + rank
    slots = tl.load(slots_ptr + picks, mask=kept, other=0)
    d_scores = tl.load(d_scores_ptr + picks, mask=kept, other=0.0).to(tl.float32)
    place = tl.where(kept, tl.where(half == 0, slots // NUM, slots % NUM), -1)
    out = d_half_ptr + (tl.program_id(1).to(tl.int64) * TOKENS + token) * NUM
    column = tl.arange(0, ROUND_NUM)
    zeros = tl.zeros((ROUND_NUM,), tl.float32).to(d_half_ptr.dtype.element_ty)
    tl.store(out + column, zeros, mask=column < NUM)
    # Every pick of a sub-key computes the same sum in the same order and writes it to the same place.
    same = place[:, None] == place[None, :]
    total = tl.sum(tl.where(same, d_scores[None, :], 0.0), axis=1)
    tl.debug_barrier()
    tl.store(out + place, total.to(d_half_ptr.dtype.element_ty), mask=kept)


@triton_call.sequential
def _scatter(
    indices: Int[Array, "t h k"], d_scores: Float[Array, "t h k"], *, num_keys: int, dtype: jnp.dtype
) -> Float[Array, "h 2 t n"]:
    """The cotangent of the half scores, as `dtype`."""
    tokens, heads, top_k = indices.shape
    (d_half,) = triton_call.launch(
        scatter_kernel,
        indices,
        d_scores,
        out=[jax.ShapeDtypeStruct((heads, 2, tokens, num_keys), dtype)],
        grid=(tokens, 2 * heads),
        num_warps=1,
        TOKENS=tokens,
        HEADS=heads,
        NUM=num_keys,
        ROUND_NUM=next_power_of_two(num_keys),
        TOP_K=top_k,
        ROUND_K=tiles.round_k(top_k),
    )
    return d_half
