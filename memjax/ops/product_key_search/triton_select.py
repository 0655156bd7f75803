"""The best k scores of every row, exactly, as a Triton kernel."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from memjax.ops import triton_call
from memjax.ops.product_key_search import tiles
from memjax.ops.product_key_search import triton_ranking as ranking
from memjax.ops.tiles import ceil_div, next_power_of_two


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
    """The best k of NUM scores in a row. They lie in the k groups with the best maxima, so only those are searched.

    RUN neighbouring scores form a run; run r belongs to group r % GROUPS, which has RUNS of them, so that threads
    compute the groups' maxima without exchanging data. Fast 32-bit sorts choose groups, then runs of those groups, then
    scores of those runs. They can err only among scores that agree in their leading bits; that is detected, and the row
    is then sorted exactly, which is slower.
    """
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * NUM
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, RUN)
    maxima = tl.full((GROUPS,), ranking.WORST, tl.int32)
    for run in tl.static_range(RUNS):
        place = (run * GROUPS + group)[:, None] * RUN + member[None, :]
        maxima = tl.maximum(maxima, tl.max(ranking.load_bits(scores_ptr, place, NUM), axis=1))
    if RUNS * RUN == 1:
        chosen = ranking.exact_topk(maxima, group, ROUND_K)
    else:
        chosen = ranking.approx_topk(maxima, group, GROUPS - 1, ROUND_K)
        runs = tl.arange(0, RUNS)[None, :] * GROUPS + chosen[:, None]
        bits = ranking.load_bits(scores_ptr, runs[:, :, None] * RUN + member[None, None, :], NUM)
        if ranking.approx_failed(maxima, tl.max(tl.max(bits, axis=2), axis=1)):
            chosen = ranking.exact_topk(maxima, group, ROUND_K)
            runs = tl.arange(0, RUNS)[None, :] * GROUPS + chosen[:, None]
            bits = ranking.load_bits(scores_ptr, runs[:, :, None] * RUN + member[None, None, :], NUM)

        if RUNS > 1:
            maxima = tl.reshape(tl.max(bits, axis=2), [ROUND_K * RUNS])
            runs = tl.reshape(runs, [ROUND_K * RUNS])
            chosen = ranking.approx_topk(maxima, runs, GROUPS * RUNS - 1, ROUND_K)
            place = chosen[:, None] * RUN + member[None, :]
            bits = ranking.load_bits(scores_ptr, place, NUM)
            if ranking.approx_failed(maxima, tl.max(bits, axis=1)):
                chosen = ranking.exact_topk(maxima, runs, ROUND_K)
                place = chosen[:, None] * RUN + member[None, :]
                bits = ranking.load_bits(scores_ptr, place, NUM)
        else:
            place = runs * RUN + member[None, :]

        bits = tl.reshape(bits, [ROUND_K * RUN])
        place = tl.reshape(place, [ROUND_K * RUN])
        chosen = ranking.approx_topk(bits, place, GROUPS * RUNS * RUN - 1, ROUND_K)
        chosen_bits = ranking.load_bits(scores_ptr, chosen, NUM)
        if ranking.approx_failed(bits, chosen_bits):
            chosen = ranking.exact_topk(bits, place, ROUND_K)
        else:
            chosen = ranking.ordered_topk(chosen_bits, chosen, ROUND_K)
    rank = tl.arange(0, ROUND_K)
    kept = rank < TOP_K
    # The score is read again, not rebuilt from its bits, so that a NaN keeps its bits.
    score = tl.load(scores_ptr + chosen, mask=kept, other=0.0)
    tl.store(best_ptr + row * TOP_K + rank, score, mask=kept)
    tl.store(places_ptr + row * TOP_K + rank, chosen, mask=kept)


@triton_call.sequential
def select(scores: Float[Array, "*r n"], *, top_k: int) -> tuple[Float[Array, "*r k"], Int[Array, "*r k"]]:
    """The exact top_k of every row of float32 scores, best first."""
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
        ROUND_K=tiles.round_k(top_k),
        GROUPS=tile.rows,
        RUNS=ceil_div(next_power_of_two(num), tile.rows * tile.columns),
        RUN=tile.columns,
    )
    return best, places
