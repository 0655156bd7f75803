"""Tile sizes of the selection of the best scores.

With one warp a row takes the fewest instructions, which counts where rows fill the GPU. Few rows leave it empty; their
tiles are looked up by names of their own, so that tuning can give them more warps.
"""

from typing import NamedTuple

from memjax.ops.tiles import Tile, next_power_of_two, tuned

_FEW_ROWS = 1024
"""Rows of scores, two for a token and head, that leave a GPU empty at one warp each: four heads of 128 tokens."""
_MOST_RANKED = 128
"""Candidates that are compared with each other at most: their pairs are the work."""


class Pairing(NamedTuple):
    """How the best sums of two halves are found."""

    num_warps: int
    by_rank: bool
    """Whether all sums are compared with each other at once, not sorted."""


def select(num: int, top_k: int, rows: int) -> Tile:
    """Groups (`rows`) and neighbouring scores (`columns`) of the selection from each of `rows` rows of `num` scores."""
    whole, is_few = next_power_of_two(num), rows <= _FEW_ROWS
    found = tuned("product_key_search", f"select{'_long' * (whole > 2048)}{'_few' * is_few}")
    # Fewer groups than picks would leave picks out, and a short row is sorted at once.
    run = min(found.get("columns", 4), max(1, whole // (2 * round_k(top_k))))
    groups = min(max(found.get("rows", 256 if whole > 2048 else 128), 2 * round_k(top_k)), max(2, whole // run))
    return Tile(rows=groups, columns=run, num_warps=found.get("num_warps", 1))


def pair(num_pairs: int, tokens_and_heads: int) -> Pairing:
    """For the pairs of every token and head."""
    is_few = 2 * tokens_and_heads <= _FEW_ROWS
    found = tuned("product_key_search", "pair_few" if is_few else "pair")
    by_rank = bool(found.get("by_rank", is_few)) and num_pairs <= _MOST_RANKED
    return Pairing(found.get("num_warps", 4 if by_rank else 1), by_rank)


def round_k(top_k: int) -> int:
    """Picks that are sorted: tl.topk takes powers of two from 2 on."""
    return max(2, next_power_of_two(top_k))
