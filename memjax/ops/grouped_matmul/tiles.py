"""Tile sizes of grouped matmuls."""

import dataclasses

from memjax.ops.tiles import next_power_of_two, tuned


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulTile:
    """The part of a matrix product that one program computes: rows x columns of it, `inner` summands at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    """Loads of summands in flight at once."""


def grouped_matmul(rows: int, columns: int, inner: int, itemsize: int) -> MatmulTile:
    """The tile for groups of about `rows` rows; 128 x 256 keeps a Hopper GPU's tensor cores busy."""
    return _matmul("grouped_matmul", rows, columns, inner, itemsize)


def grouped_matmul_gradient(rows: int, columns: int, inner: int, itemsize: int) -> MatmulTile:
    """The tile for the gradient of the matrices, a sum over groups of about `inner` rows."""
    return _matmul("grouped_matmul_gradient", rows, columns, inner, itemsize)


def _matmul(name: str, rows: int, columns: int, inner: int, itemsize: int) -> MatmulTile:
    # Wide types fill shared memory and registers sooner.
    widest, deepest = (256, 64) if itemsize <= 2 else (64, 32)
    tile = MatmulTile(rows=128 if itemsize <= 2 else 64, columns=widest, inner=deepest, num_warps=8, num_stages=3)
    tile = dataclasses.replace(tile, **(tuned("grouped_matmul", name) if itemsize <= 2 else {}))
    # Small groups and matrices leave most of a large tile empty; tl.dot needs at least 16 in each dimension.
    fit = lambda part, size: min(part, max(16, next_power_of_two(size)))
    return dataclasses.replace(
        tile, rows=fit(tile.rows, rows), columns=fit(tile.columns, columns), inner=fit(tile.inner, inner)
    )
