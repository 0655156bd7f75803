"""How the Triton kernels cut their work, as pure functions of the shapes.

`tiles.json` holds what `experiments/bench/tune.py` found best on a kind of device; a kind that is not in it gets the
defaults here, which are chosen for 16-byte loads and enough of them in flight.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import jax

from memjax.ops.table import Table

FILE = pathlib.Path(__file__).with_name("tiles.json")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """The part of the work that one program of a kernel does at a time."""

    rows: int
    """Table rows, or rows of scores; a power of two."""
    columns: int
    """Columns; a power of two."""
    num_warps: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulTile:
    """The part of a matrix product that one program forms: rows x columns of it, `inner` summands at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    """Loads of summands that are under way at once."""


def grouped_matmul(rows: int, columns: int, inner: int, itemsize: int) -> MatmulTile:
    """Of groups of about so many rows; 128 x 256 keep the matrix units of a Hopper busy."""
    return _matmul("grouped_matmul", rows, columns, inner, itemsize)


def grouped_matmul_gradient(rows: int, columns: int, inner: int, itemsize: int) -> MatmulTile:
    """Of the matrices, whose sums go over groups of about `inner` rows."""
    return _matmul("grouped_matmul_gradient", rows, columns, inner, itemsize)


def _matmul(operation: str, rows: int, columns: int, inner: int, itemsize: int) -> MatmulTile:
    # Wide types fill shared memory and registers sooner.
    widest, deepest = (256, 64) if itemsize <= 2 else (64, 32)
    tile = MatmulTile(rows=128 if itemsize <= 2 else 64, columns=widest, inner=deepest, num_warps=8, num_stages=3)
    tile = dataclasses.replace(tile, **(_table().get(operation, {}) if itemsize <= 2 else {}))
    # Small groups and matrices leave most of a large tile empty; tl.dot takes 16 of everything at least.
    fit = lambda part, size: min(part, max(16, next_power_of_two(size)))
    return dataclasses.replace(
        tile, rows=fit(tile.rows, rows), columns=fit(tile.columns, columns), inner=fit(tile.inner, inner)
    )


def embedding_bag(dim: int, picks: int, table: Table, tokens: int) -> Tile:
    """16 rows in flight; a warp reads 512 bytes of each."""
    return _tuned(*_of_rows("embedding_bag", table, tokens), dim, picks)


def embedding_dot(dim: int, picks: int, table: Table, tokens: int) -> Tile:
    """Like the bag, but a program keeps all columns of its rows."""
    return _tuned(*_of_rows("embedding_dot", table, tokens), dim, picks)


FEW_TOKENS = 16
"""Up to here a program for every 128 bytes of a bag keeps the bus to host memory busy; more tokens do so by themselves,
and then long reads are the faster ones."""


def _of_rows(operation: str, table: Table, tokens: int) -> tuple[str, Tile]:
    """The name under which tiles are tuned, and the default, for a table's format and place."""
    bits = 8 * table.format.payload_dtype.itemsize * table.format.payload_columns(64) // 64
    if table.place == "host":
        if tokens <= FEW_TOKENS:
            return f"{operation}_host_few", Tile(rows=32, columns=128 * 8 // bits, num_warps=1)
        return f"{operation}_host", Tile(rows=8, columns=min(1024, 2048 * 8 // bits), num_warps=4)
    if table.format.has_scales:
        # Codes become float32 in registers: 4,096 of them fill those of a warp.
        columns = 512 * 8 // bits
        return f"{operation}_{table.format.name}", Tile(rows=max(4, 4096 // columns), columns=columns, num_warps=1)
    return operation, Tile(rows=16, columns=512 * 8 // bits, num_warps=1)


def select(num: int, top_k: int) -> Tile:
    """Groups (`rows`) and neighbouring scores (`columns`) of the selection from a row of `num` scores."""
    whole, round_k = next_power_of_two(num), max(2, next_power_of_two(top_k))
    tuned = _table().get("select" if whole <= 2048 else "select_long", {})
    # Fewer groups than picks would leave picks out, and a short row is sorted at once.
    run = min(tuned.get("columns", 4), max(1, whole // (2 * round_k)))
    groups = min(max(tuned.get("rows", 256 if whole > 2048 else 128), 2 * round_k), max(2, whole // run))
    return Tile(rows=groups, columns=run, num_warps=tuned.get("num_warps", 1))


def row_update(columns: int) -> Tile:
    """Picks in flight (at most 8, they divide a chunk), and the columns that share a state: 256 keep a warp busy."""
    width = next_power_of_two(columns)
    tile = Tile(rows=4, columns=width, num_warps=max(1, width // 256))
    return dataclasses.replace(tile, **_table().get("row_update", {}))


def rms_norm(dim: int) -> Tile:
    """Whole rows: a thread holds 16 bytes of 16-bit numbers of each."""
    return _whole_rows("rms_norm", Tile(rows=4, columns=next_power_of_two(dim), num_warps=4))


def rms_norm_gradient(dim: int) -> Tile:
    """Like the norm; rows in flight of three arrays."""
    return _whole_rows("rms_norm_gradient", Tile(rows=2, columns=next_power_of_two(dim), num_warps=4))


def _whole_rows(operation: str, default: Tile) -> Tile:
    """Fewer rows and more warps where rows are long: their numbers have to fit into registers."""
    tile = dataclasses.replace(default, **_table().get(operation, {}))
    longer = max(1, tile.columns // 1024)
    warps = min(32, tile.num_warps * longer)
    return dataclasses.replace(tile, rows=max(1, tile.rows // longer), num_warps=warps)


def _tuned(operation: str, default: Tile, dim: int, picks: int) -> Tile:
    tile = dataclasses.replace(default, **_table().get(operation, {}))
    return dataclasses.replace(
        tile, columns=min(tile.columns, _columns(dim)), rows=min(tile.rows, next_power_of_two(picks))
    )


def _columns(dim: int) -> int:
    """Columns of a program that covers dim without much waste: the power of two that divides it, or 64 and a rest."""
    return max(dim & -dim, min(64, next_power_of_two(dim)))


_tried: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def trying(operation: str, **fields: int) -> Iterator[None]:
    """Kernels traced inside the block use these fields of a tile: how tiles are tuned."""
    _tried[operation] = fields
    try:
        yield
    finally:
        del _tried[operation]


def _table() -> dict[str, dict[str, int]]:
    """The tuned tiles of this machine's kind of device."""
    kind = jax.devices()[0].device_kind
    return next((tuned for name, tuned in _tables().items() if kind.startswith(name)), {}) | _tried


@functools.cache
def _tables() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def ceil_div(size: int, part: int) -> int:
    """Parts that cover size."""
    return -(-size // part)


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is not below value."""
    return 1 << max(0, value - 1).bit_length()
