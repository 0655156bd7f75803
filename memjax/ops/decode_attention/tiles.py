"""Tile sizes of decode attention."""

from typing import NamedTuple


class Tile(NamedTuple):
    """How the cache is divided among programs."""

    programs: int
    """Number of programs to aim for, if the cache is long enough."""
    block: int
    """Entries of the cache that a program reads at a time."""
    num_warps: int
    num_stages: int


def default_tile(width: int, itemsize: int) -> Tile:
    """The tile for heads of `width` columns.

    Programs are small: at a width of 64 a multiprocessor holds eight, so a GPU of about 130 runs 1,024 at once, with
    enough loads in flight to saturate its memory.
    """
    if width <= 128 and itemsize <= 2:
        return Tile(programs=1024, block=32, num_warps=2, num_stages=4)
    return Tile(programs=512, block=32, num_warps=4, num_stages=3)
