"""Tile sizes of the norm and its gradient."""

import dataclasses

from memjax.ops.tiles import Tile, next_power_of_two, tuned


def rms_norm(dim: int) -> Tile:
    """Whole rows; a thread holds 16 bytes of each, if numbers have 16 bits."""
    return _whole_rows("rms_norm", Tile(rows=4, columns=next_power_of_two(dim), num_warps=4))


def rms_norm_gradient(dim: int) -> Tile:
    """Like the norm, but with rows of three arrays in flight."""
    return _whole_rows("rms_norm_gradient", Tile(rows=2, columns=next_power_of_two(dim), num_warps=4))


def _whole_rows(name: str, default: Tile) -> Tile:
    """Fewer rows and more warps if rows are long, because they must fit into registers."""
    tile = dataclasses.replace(default, **tuned("rms_norm", name))
    longer = max(1, tile.columns // 1024)
    warps = min(32, tile.num_warps * longer)
    return dataclasses.replace(tile, rows=max(1, tile.rows // longer), num_warps=warps)
