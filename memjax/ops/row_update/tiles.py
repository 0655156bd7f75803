"""Tile sizes of the row update."""

import dataclasses

from memjax.ops.tiles import Tile, next_power_of_two, tuned


def row_update(columns: int) -> Tile:
    """Picks in flight (at most 8, and a divisor of the chunk), and columns that share a state: 256 keep a warp busy."""
    width = next_power_of_two(columns)
    tile = Tile(rows=4, columns=width, num_warps=max(1, width // 256))
    return dataclasses.replace(tile, **tuned("row_update", "row_update"))
