"""The product-key search with Triton kernels around XLA's matrix products.

Half scores are made by a matrix product, [h, 2, t, n] in float32, those of a single token by `score_kernel`, which
reads the keys at the pace of the memory; `select_kernel` takes the best k of every row,
exactly; `pair_kernel` takes the best k sums of the two halves. What decides is 64-bit words, a score's order-
preserving bits above its place, so that equal scores never lose or repeat a place.
"""

from functools import partial

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.manual_axes import vary_like
from memjax.ops.precision import accumulator
from memjax.ops.product_key_search import tiles
from memjax.ops.product_key_search.xla import candidate_pairs, chunked, map_chunks, tokens_of
from memjax.ops.tiles import ceil_div, next_power_of_two

CHUNK_BYTES = 1 << 30
"""Half scores that exist at once."""
_SCORES = 4096
"""Numbers of keys that a program reads for a single token: 64 bytes for each thread."""

WORST = tl.constexpr(-(1 << 31))
LEAST = tl.constexpr(-(1 << 63))


@triton.jit
def order_bits(scores):
    """Signed integers in the order of float32 scores; every NaN comes after infinity."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(scores == scores, bits, 0x7FFFFFFF)


@triton.jit
def with_place(bits, place):
    """Words that sort by bits, then by place."""
    return (bits.to(tl.int64) << 32) | place.to(tl.int64)


@triton.jit
def place_of(word):
    """The place in a word."""
    return (word & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def load_bits(scores_ptr, place, NUM: tl.constexpr):
    """Order-preserving bits of the scores at some places; places outside the row come last."""
    scores = tl.load(scores_ptr + place, mask=place < NUM, other=0.0)
    return tl.where(place < NUM, order_bits(scores), WORST)


@triton.jit
def quick_best(bits, number, MASK: tl.constexpr, ROUND_K: tl.constexpr):
    """Numbers of the ROUND_K best, up to near ties: 32-bit words hold the number in place of the lowest bits."""
    return tl.topk((bits & ~MASK) | number, ROUND_K) & MASK


@triton.jit
def missed(bits, chosen):
    """Whether something better than the worst of the chosen was left out, and the exact way must be taken."""
    worst = tl.min(chosen, axis=0)
    return tl.sum((bits > worst).to(tl.int32), axis=0) != tl.sum((chosen > worst).to(tl.int32), axis=0)


@triton.jit
def exact_best(bits, number, ROUND_K: tl.constexpr):
    """Numbers of the ROUND_K best, best first, taken one after the other: slow, for few rows, and little code."""
    words = with_place(bits, number)
    rank = tl.arange(0, ROUND_K)
    chosen = tl.zeros((ROUND_K,), tl.int64)
    for nth in range(ROUND_K):
        best = tl.max(words, axis=0)
        chosen = tl.where(rank == nth, best, chosen)
        words = tl.where(words == best, LEAST, words)
    return place_of(chosen)


@triton.jit
def in_order(bits, number, ROUND_K: tl.constexpr):
    """The ROUND_K numbers, best first; of equal bits the higher number comes first."""
    return place_of(tl.topk(with_place(bits, number), ROUND_K))


@triton.jit
def best_by_rank(bits, number, ROUND_K: tl.constexpr):
    """`in_order` by the count of what is better than each: 2 ** 14 independent comparisons for 128 numbers."""
    words = with_place(bits, number)
    rank = tl.sum((words[:, None] > words[None, :]).to(tl.int32), axis=0)
    return tl.sum(tl.where(rank[:, None] == tl.arange(0, ROUND_K)[None, :], number[:, None], 0), axis=0)


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
    """Scores of ROWS keys of a head's half for a single token, in float32."""
    part = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, ROUND_HALF)
    inside = (row < NUM)[:, None] & (column < HALF)[None, :]
    query = tl.load(queries_ptr + part * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    place = (part * NUM + row)[:, None] * HALF + column[None, :]
    keys = tl.load(keys_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(scores_ptr + part * NUM + row, tl.sum(keys * query[None, :], axis=1), mask=row < NUM)


@triton.jit
def select_kernel(
    scores_ptr,
    best_ptr,
    places_ptr,
    NUM: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUND_K: tl.constexpr,
    GROUPS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """The best of NUM scores in a row. The k best lie in the k groups with the best maxima: only those are looked at.

    RUN neighbouring scores are a run; run r belongs to group r % GROUPS, which has RUNS of them, so that the maxima of
    the groups form without any exchange between threads. Groups, then runs of the chosen groups, then scores of the
    chosen runs are chosen by quick 32-bit sorts. A quick sort can err only among scores that agree in their leading
    bits; that is detected, and the row then takes the exact, slower way.
    """
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * NUM
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, RUN)
    maxima = tl.full((GROUPS,), WORST, tl.int32)
    for run in tl.static_range(RUNS):
        place = (run * GROUPS + group)[:, None] * RUN + member[None, :]
        maxima = tl.maximum(maxima, tl.max(load_bits(scores_ptr, place, NUM), axis=1))
    if RUNS * RUN == 1:
        chosen = exact_best(maxima, group, ROUND_K)
    else:
        chosen = quick_best(maxima, group, GROUPS - 1, ROUND_K)
        runs = tl.arange(0, RUNS)[None, :] * GROUPS + chosen[:, None]
        bits = load_bits(scores_ptr, runs[:, :, None] * RUN + member[None, None, :], NUM)
        if missed(maxima, tl.max(tl.max(bits, axis=2), axis=1)):
            chosen = exact_best(maxima, group, ROUND_K)
            runs = tl.arange(0, RUNS)[None, :] * GROUPS + chosen[:, None]
            bits = load_bits(scores_ptr, runs[:, :, None] * RUN + member[None, None, :], NUM)

        if RUNS > 1:
            maxima = tl.reshape(tl.max(bits, axis=2), [ROUND_K * RUNS])
            runs = tl.reshape(runs, [ROUND_K * RUNS])
            chosen = quick_best(maxima, runs, GROUPS * RUNS - 1, ROUND_K)
            place = chosen[:, None] * RUN + member[None, :]
            bits = load_bits(scores_ptr, place, NUM)
            if missed(maxima, tl.max(bits, axis=1)):
                chosen = exact_best(maxima, runs, ROUND_K)
                place = chosen[:, None] * RUN + member[None, :]
                bits = load_bits(scores_ptr, place, NUM)
        else:
            place = runs * RUN + member[None, :]

        bits = tl.reshape(bits, [ROUND_K * RUN])
        place = tl.reshape(place, [ROUND_K * RUN])
        chosen = quick_best(bits, place, GROUPS * RUNS * RUN - 1, ROUND_K)
        chosen_bits = load_bits(scores_ptr, chosen, NUM)
        if missed(bits, chosen_bits):
            chosen = exact_best(bits, place, ROUND_K)
        else:
            chosen = in_order(chosen_bits, chosen, ROUND_K)
    rank = tl.arange(0, ROUND_K)
    kept = rank < TOP_K
    # The score itself is read again, not made from its bits: NaN stays the NaN it was.
    score = tl.load(scores_ptr + chosen, mask=kept, other=0.0)
    tl.store(best_ptr + row * TOP_K + rank, score, mask=kept)
    tl.store(places_ptr + row * TOP_K + rank, chosen, mask=kept)


@triton.jit
def load_pairs(best_ptr, first_ptr, second_ptr, left, right, pair, PAIRS: tl.constexpr):
    """Sums of pairs of ranks, and where the two halves of each lie."""
    valid = pair < PAIRS
    first = left + tl.load(first_ptr + pair, mask=valid, other=0)
    second = right + tl.load(second_ptr + pair, mask=valid, other=0)
    return tl.load(best_ptr + first) + tl.load(best_ptr + second), first, second


@triton.jit
def pair_kernel(
    best_ptr,
    places_ptr,
    first_ptr,
    second_ptr,
    scores_ptr,
    slots_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    NUM: tl.constexpr,
    PAIRS: tl.constexpr,
    ROUND_PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUND_K: tl.constexpr,
):
    """The best sums of a token and head; inputs are [h, 2, t, k], outputs [t, h, k]."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    left = (2 * head * TOKENS + token) * TOP_K
    right = left + TOKENS * TOP_K
    pair = tl.arange(0, ROUND_PAIRS)
    sums, _, _ = load_pairs(best_ptr, first_ptr, second_ptr, left, right, pair, PAIRS)
    bits = tl.where(pair < PAIRS, order_bits(sums), WORST)
    chosen = quick_best(bits, pair, ROUND_PAIRS - 1, ROUND_K)
    sums, _, _ = load_pairs(best_ptr, first_ptr, second_ptr, left, right, chosen, PAIRS)
    chosen_bits = tl.where(chosen < PAIRS, order_bits(sums), WORST)
    if missed(bits, chosen_bits):
        chosen = exact_best(bits, pair, ROUND_K)
    else:
        chosen = in_order(chosen_bits, chosen, ROUND_K)
    sums, first, second = load_pairs(best_ptr, first_ptr, second_ptr, left, right, chosen, PAIRS)
    rank = tl.arange(0, ROUND_K)
    kept = rank < TOP_K
    slots = tl.load(places_ptr + first) * NUM + tl.load(places_ptr + second)
    out = (token * HEADS + head) * TOP_K + rank
    tl.store(scores_ptr + out, sums, mask=kept)
    tl.store(slots_ptr + out, slots, mask=kept)


@triton.jit
def ranks_of_pair(pair, TOP_K: tl.constexpr):
    """Ranks in the two halves of the pairs that `xla.candidate_pairs` lists, computed: no load to wait for."""
    first, begin, start = pair * 0, pair * 0, 0
    for rank in tl.static_range(1, TOP_K):
        # The pairs of the rank before end here.
        start += TOP_K // rank
        first += (pair >= start).to(tl.int32)
        begin = tl.where(pair >= start, start, begin)
    return first, pair - begin


@triton.jit
def ranked_pair_kernel(
    best_ptr,
    places_ptr,
    out_ptr,
    slots_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    NUM: tl.constexpr,
    PAIRS: tl.constexpr,
    ROUND_PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUND_K: tl.constexpr,
    SCALE: tl.constexpr,
):
    """`pair_kernel` by rank; with a SCALE the softmax of the scaled scores in place of the scores."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    best_ptr += (2 * head * TOKENS + token) * TOP_K
    places_ptr += (2 * head * TOKENS + token) * TOP_K
    right = TOKENS * TOP_K
    pair = tl.arange(0, ROUND_PAIRS)
    first, second = ranks_of_pair(pair, TOP_K)
    valid = pair < PAIRS
    sums = tl.load(best_ptr + first, mask=valid, other=0.0) + tl.load(best_ptr + right + second, mask=valid, other=0.0)
    chosen = best_by_rank(tl.where(valid, order_bits(sums), WORST), pair, ROUND_K)
    first, second = ranks_of_pair(chosen, TOP_K)
    rank = tl.arange(0, ROUND_K)
    kept = rank < TOP_K
    slots = tl.load(places_ptr + first, mask=kept, other=0) * NUM + tl.load(
        places_ptr + right + second, mask=kept, other=0
    )
    out = tl.load(best_ptr + first, mask=kept, other=0.0) + tl.load(best_ptr + right + second, mask=kept, other=0.0)
    if SCALE is not None:
        scaled = tl.where(kept, out * SCALE, -3.0e38)
        out = tl.where(kept, tl.exp(scaled - tl.max(scaled, axis=0)), 0.0)
        out = out / tl.sum(out, axis=0)
    at = (token * HEADS + head) * TOP_K + rank
    tl.store(out_ptr + at, out, mask=kept)
    tl.store(slots_ptr + at, slots, mask=kept)


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
    """Row of d(half scores) of a token, head and half: zeros, and the sum over the picks of a sub-key in its place."""
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


def product_key_search(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """The reference's slots (equal scores in any order), best first; `chunk_bytes` of half scores exist at once."""
    search = partial(_search_chunk, keys=keys, top_k=top_k)
    return map_chunks(search, queries, chunk=tokens_of(chunk_bytes, keys))


def weighted_search(
    queries: Float[Array, "t h key_dim"], keys: Float[Array, "h 2 n half"], top_k: int, scale: float
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """The slots with the softmax of their scaled scores, by as many kernels as the search where tokens are few."""
    tokens, heads, _ = queries.shape
    if tokens > tokens_of(CHUNK_BYTES, keys) or not tiles.pair(_num_pairs(top_k), tokens * heads).by_rank:
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
    """Cotangents of queries and keys: d(half scores), in the type of the keys, and two matrix products with it."""
    wide = accumulator(keys.dtype)

    def one_chunk(d_keys: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        queries, indices, d_scores = chunk
        d_half = _scatter(indices, d_scores, jnp.zeros((), keys.dtype), num_keys=keys.shape[2])
        halves = queries.reshape(*queries.shape[:2], 2, -1)
        d_halves = _product("hctn,hcnd->thcd", d_half, keys)
        d_keys += _product("hctn,thcd->hcnd", d_half, halves)
        return d_keys, d_halves.reshape(queries.shape).astype(queries.dtype)

    chunk, zero = tokens_of(chunk_bytes, keys), vary_like(jnp.zeros(keys.shape, wide), queries)
    if queries.shape[0] <= chunk:
        d_keys, d_queries = one_chunk(zero, (queries, indices, d_scores))
        return d_queries, d_keys.astype(keys.dtype)
    d_keys, d_queries = jax.lax.scan(one_chunk, zero, chunked((queries, indices, d_scores), chunk))
    return d_queries.reshape(-1, *queries.shape[1:])[: queries.shape[0]], d_keys.astype(keys.dtype)


def _search_chunk(queries: Array, keys: Array, top_k: int, scale: float | None = None) -> tuple[Array, Array]:
    if queries.shape[0] == 1:
        scores = sequential_vmap(_scores_of_one)(queries, keys)
    else:
        halves = queries.reshape(*queries.shape[:2], 2, -1)
        scores = _product("thcd,hcnd->hctn", halves, keys)
    best, places = select(scores, top_k=top_k)
    return _pairs(best, places, num_keys=keys.shape[2], scale=scale)


def _scores_of_one(queries: Float[Array, "1 h key_dim"], keys: Float[Array, "h 2 n half"]) -> Array:
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


def _product(subscripts: str, left: Array, right: Array) -> Array:
    """An einsum into float32; float32 factors are not rounded to TF32."""
    if triton_call.is_interpreted():  # XLA's CPU products do not widen bfloat16
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32, precision="highest")


def select(scores: Float[Array, "*r n"], *, top_k: int) -> tuple[Float[Array, "*r k"], Int[Array, "*r k"]]:
    """The exact top_k of every row of float32 scores, best first."""
    return sequential_vmap(partial(_select, top_k=top_k))(scores)


def _select(scores: Array, *, top_k: int) -> tuple[Array, Array]:
    num, rows = scores.shape[-1], scores.size // scores.shape[-1]
    tile = tiles.select(num, top_k, rows)
    shape = (*scores.shape[:-1], top_k)
    best, places = triton_call.launch(
        select_kernel,
        scores,
        out=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
        grid=(rows,),
        num_warps=tile.num_warps,
        NUM=num,
        TOP_K=top_k,
        ROUND_K=_round_k(top_k),
        GROUPS=tile.rows,
        RUNS=ceil_div(next_power_of_two(num), tile.rows * tile.columns),
        RUN=tile.columns,
    )
    return best, places


def _pairs(
    best: Float[Array, "h 2 t k"], places: Int[Array, "h 2 t k"], *, num_keys: int, scale: float | None
) -> tuple[Array, Array]:
    return sequential_vmap(partial(_launch_pairs, num_keys=num_keys, scale=scale))(best, places)


def _launch_pairs(best: Array, places: Array, *, num_keys: int, scale: float | None) -> tuple[Array, Array]:
    heads, _, tokens, top_k = best.shape
    num_pairs, round_k, shape = _num_pairs(top_k), _round_k(top_k), (tokens, heads, top_k)
    tile = tiles.pair(num_pairs, tokens * heads)
    ranks = [] if tile.by_rank else [jnp.asarray(ranks, jnp.int32) for ranks in candidate_pairs(top_k)]
    scores, slots = triton_call.launch(
        ranked_pair_kernel if tile.by_rank else pair_kernel,
        best,
        places,
        *ranks,
        out=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
        grid=(tokens, heads),
        num_warps=tile.num_warps,
        TOKENS=tokens,
        HEADS=heads,
        NUM=num_keys,
        PAIRS=num_pairs,
        # tl.topk wants at least as many as it keeps.
        ROUND_PAIRS=max(round_k, next_power_of_two(num_pairs)),
        TOP_K=top_k,
        ROUND_K=round_k,
        **({"SCALE": scale} if tile.by_rank else {}),
    )
    return scores, slots


def _scatter(indices: Array, d_scores: Array, like: Array, *, num_keys: int) -> Float[Array, "h 2 t n"]:
    return sequential_vmap(partial(_launch_scatter, num_keys=num_keys))(indices, d_scores, like)


def _launch_scatter(indices: Array, d_scores: Array, like: Array, *, num_keys: int) -> Array:
    tokens, heads, top_k = indices.shape
    (d_half,) = triton_call.launch(
        scatter_kernel,
        indices,
        d_scores,
        out=[jax.ShapeDtypeStruct((heads, 2, tokens, num_keys), like.dtype)],
        grid=(tokens, 2 * heads),
        num_warps=1,
        TOKENS=tokens,
        HEADS=heads,
        NUM=num_keys,
        ROUND_NUM=next_power_of_two(num_keys),
        TOP_K=top_k,
        ROUND_K=_round_k(top_k),
    )
    return d_half


def _num_pairs(top_k: int) -> int:
    return len(candidate_pairs(top_k)[0])


def _round_k(top_k: int) -> int:
    """Picks that are sorted: tl.topk takes powers of two from 2 on."""
    return max(2, next_power_of_two(top_k))
