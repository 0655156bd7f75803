"""How kernels rank scores: by 64-bit words that hold a score's order-preserving bits above its place.

Places are therefore never lost or repeated when scores are equal.
"""

import triton
import triton.language as tl

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
    """Order-preserving bits of the scores at the given places; places outside the row rank last."""
    scores = tl.load(scores_ptr + place, mask=place < NUM, other=0.0)
    return tl.where(place < NUM, order_bits(scores), WORST)


@triton.jit
def approx_topk(bits, number, MASK: tl.constexpr, ROUND_K: tl.constexpr):
    """Numbers of the ROUND_K best, up to near ties: in 32-bit words, the number replaces the lowest bits."""
    return tl.topk((bits & ~MASK) | number, ROUND_K) & MASK


@triton.jit
def approx_failed(bits, chosen):
    """Whether anything better than the worst of the chosen was left out, so that `exact_topk` is needed."""
    worst = tl.min(chosen, axis=0)
    return tl.sum((bits > worst).to(tl.int32), axis=0) != tl.sum((chosen > worst).to(tl.int32), axis=0)


@triton.jit
def exact_topk(bits, number, ROUND_K: tl.constexpr):
    """Numbers of the ROUND_K best, best first, found one by one: slow, but little code, and needed by few rows."""
    words = with_place(bits, number)
    rank = tl.arange(0, ROUND_K)
    chosen = tl.zeros((ROUND_K,), tl.int64)
    for nth in range(ROUND_K):
        best = tl.max(words, axis=0)
        chosen = tl.where(rank == nth, best, chosen)
        words = tl.where(words == best, LEAST, words)
    return place_of(chosen)


@triton.jit
def ordered_topk(bits, number, ROUND_K: tl.constexpr):
    """Numbers of the ROUND_K best, best first; among equal bits, the higher number comes first."""
    return place_of(tl.topk(with_place(bits, number), ROUND_K))


@triton.jit
def topk_by_rank(bits, number, ROUND_K: tl.constexpr):
    """`ordered_topk` by counting how many are better than each: 2 ** 14 independent comparisons for 128 numbers."""
    words = with_place(bits, number)
    rank = tl.sum((words[:, None] > words[None, :]).to(tl.int32), axis=0)
    return tl.sum(tl.where(rank[:, None] == tl.arange(0, ROUND_K)[None, :], number[:, None], 0), axis=0)
