"""Tile sizes of the selection of the best scores.

A row takes the fewest instructions with one warp, which matters when there are enough rows to fill the GPU. The tiles
of fewer rows are tuned under separate names, so that they can use more warps.
"""

from typing import NamedTuple

from memjax.ops.tiles import Tile, next_power_of_two, tuned

_FEW_ROWS = 1024
"""Up to this many rows of scores (two per token and head), one warp per row leaves a GPU underused."""
_MOST_RANKED = 128
"""Maximum number of candidates that are ranked by comparing all of their pairs."""


class Pairing(NamedTuple):
    """How the best sums of two halves are found."""

    num_warps: int
    by_rank: bool
    """Whether all sums are compared with each other at once instead of being sorted."""


def select(num: int, top_k: int, rows: int) -> Tile:
    """Groups (`rows`) and neighbouring scores (`columns`) of the selection from each of `rows` rows of `num` scores."""
    whole, is_few = next_power_of_two(num), rows <= _FEW_ROWS
    found = tuned("product_key_search", f"select{'_long' * (whole > 2048)}{'_few' * is_few}")
    # Fewer groups than picks would lose picks; a short row is sorted in one piece.
    run = min(found.get("columns", 4), max(1, whole // (2 * round_k(top_k))))
    groups = min(max(found.get("rows", 256 if whole > 2048 else 128), 2 * round_k(top_k)), max(2, whole // run))
    return Tile(rows=groups, columns=run, num_warps=found.get("num_warps", 1))


def pair(num_pairs: int, tokens_and_heads: int) -> Pairing:
    """How `num_pairs` sums per token and head are ranked."""
    is_few = 2 * tokens_and_heads <= _FEW_ROWS
    found = tuned("product_key_search", "pair_few" if is_few else "pair")
    by_rank = bool(found.get("by_rank", is_few)) and num_pairs <= _MOST_RANKED
    return Pairing(found.get("num_warps", 4 if by_rank else 1), by_rank)


def round_k(top_k: int) -> int:
    """top_k rounded up to what tl.topk accepts: powers of two from 2 on."""
    return max(2, next_power_of_two(top_k))
