"""The best k sums of the two halves' best scores, as Triton kernels: by sorting, or by rank if they are few."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.product_key_search import tiles
from memjax.ops.product_key_search import triton_ranking as ranking
from memjax.ops.product_key_search.xla import candidate_pairs
from memjax.ops.tiles import next_power_of_two


@triton.jit
def load_pairs(best_ptr, first_ptr, second_ptr, left, right, pair, PAIRS: tl.constexpr):
    """Sums of pairs of ranks, and the offsets of the two halves of each."""
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
    bits = tl.where(pair < PAIRS, ranking.order_bits(sums), ranking.WORST)
    chosen = ranking.approx_topk(bits, pair, ROUND_PAIRS - 1, ROUND_K)
    sums, _, _ = load_pairs(best_ptr, first_ptr, second_ptr, left, right, chosen, PAIRS)
    chosen_bits = tl.where(chosen < PAIRS, ranking.order_bits(sums), ranking.WORST)
    if ranking.approx_failed(bits, chosen_bits):
        chosen = ranking.exact_topk(bits, pair, ROUND_K)
    else:
        chosen = ranking.ordered_topk(chosen_bits, chosen, ROUND_K)
    sums, first, second = load_pairs(best_ptr, first_ptr, second_ptr, left, right, chosen, PAIRS)
    rank = tl.arange(0, ROUND_K)
    kept = rank < TOP_K
    slots = tl.load(places_ptr + first) * NUM + tl.load(places_ptr + second)
    out = (token * HEADS + head) * TOP_K + rank
    tl.store(scores_ptr + out, sums, mask=kept)
    tl.store(slots_ptr + out, slots, mask=kept)


@triton.jit
def ranks_of_pair(pair, TOP_K: tl.constexpr):
    """The ranks that `xla.candidate_pairs` lists, computed so that there is no load to wait for."""
    first, begin, start = pair * 0, pair * 0, 0
    for rank in tl.static_range(1, TOP_K):
        # The previous rank's pairs end here.
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
    """`pair_kernel` by rank; with a SCALE, it returns the softmax of the scaled scores instead of the scores."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    best_ptr += (2 * head * TOKENS + token) * TOP_K
    places_ptr += (2 * head * TOKENS + token) * TOP_K
    right = TOKENS * TOP_K
    pair = tl.arange(0, ROUND_PAIRS)
    first, second = ranks_of_pair(pair, TOP_K)
    valid = pair < PAIRS
    sums = tl.load(best_ptr + first, mask=valid, other=0.0) + tl.load(best_ptr + right + second, mask=valid, other=0.0)
    chosen = ranking.topk_by_rank(tl.where(valid, ranking.order_bits(sums), ranking.WORST), pair, ROUND_K)
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


@triton_call.sequential
def pair(
    best: Float[Array, "h 2 t k"], places: Int[Array, "h 2 t k"], *, num_keys: int, scale: float | None
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """Scores, best first, and slots of every token and head; with a scale, the softmax of the scaled scores instead."""
    heads, _, tokens, top_k = best.shape
    num_pairs, round_k, shape = count_pairs(top_k), tiles.round_k(top_k), (tokens, heads, top_k)
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
        # tl.topk needs at least as many as it keeps.
        ROUND_PAIRS=max(round_k, next_power_of_two(num_pairs)),
        TOP_K=top_k,
        ROUND_K=round_k,
        **({"SCALE": scale} if tile.by_rank else {}),
    )
    return scores, slots


def count_pairs(top_k: int) -> int:
    """The number of sums that may be among the top_k."""
    return len(candidate_pairs(top_k)[0])
