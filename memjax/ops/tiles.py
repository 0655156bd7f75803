"""Tile sizes of the Triton kernels: helpers that several operations share.

An operation's own sizes are in its `tiles.py`. Its `tiles.json` holds the sizes that `experiments/bench/tune.py` found
best on a kind of device; other devices get the defaults, which are chosen for 16-byte loads with enough of them in
flight.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import jax

from memjax.ops.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """The work that one program of a kernel does at a time."""

    rows: int
    """Table rows, or rows of scores; a power of two."""
    columns: int
    """Columns; a power of two."""
    num_warps: int


_FEW_TOKENS = {"device": 64, "host": 16}
"""Up to this many tokens, saturating device memory or the host bus takes many rows in flight, in short pieces. More
tokens saturate it by themselves, and then long reads are faster."""


def of_table_rows(operation: str, dim: int, picks: int, table: Table, tokens: int) -> Tile:
    """The tile for kernels that read `picks` table rows per token; by default 16 rows in flight, 512 bytes of each."""
    name, tile = _of_rows(operation, table, tokens)
    tile = dataclasses.replace(tile, **tuned(operation, name))
    return dataclasses.replace(
        tile, columns=min(tile.columns, _columns(dim)), rows=min(tile.rows, next_power_of_two(picks))
    )


def _of_rows(operation: str, table: Table, tokens: int) -> tuple[str, Tile]:
    """The name under which the tile for a table's format and place is tuned, and its default."""
    bits = 8 * table.format.payload_dtype.itemsize * table.format.payload_columns(64) // 64
    is_few = tokens <= _FEW_TOKENS[table.place]
    if table.place == "host":
        if is_few:
            return f"{operation}_host_few", Tile(rows=32, columns=128 * 8 // bits, num_warps=1)
        return f"{operation}_host", Tile(rows=8, columns=min(1024, 2048 * 8 // bits), num_warps=4)
    if is_few:
        return f"{operation}_few", Tile(rows=128, columns=64, num_warps=8)
    if table.format.has_scales:
        # Codes are decoded to float32 in registers; 4,096 of them fill a warp's.
        columns = 512 * 8 // bits
        return f"{operation}_{table.format.name}", Tile(rows=max(4, 4096 // columns), columns=columns, num_warps=1)
    return operation, Tile(rows=16, columns=512 * 8 // bits, num_warps=1)


def _columns(dim: int) -> int:
    """Columns per program that cover dim with little waste: the largest power of two that divides it, or 64.

    At least 8, the number of neighbouring columns that are loaded together.
    """
    return max(8, dim & -dim, min(64, next_power_of_two(dim)))


_overrides: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def override(name: str, **fields: int) -> Iterator[None]:
    """Overrides fields of the tile that is tuned under `name`, for kernels traced inside the block. Tuning uses it."""
    _overrides[name] = fields
    try:
        yield
    finally:
        del _overrides[name]


def tuned(operation: str, name: str) -> dict[str, int]:
    """The fields of a tile that have been tuned for this kind of device, or overridden."""
    kind = jax.devices()[0].device_kind
    of_kind = next((found for known, found in _tuned_by_kind(operation).items() if kind.startswith(known)), {})
    return _overrides.get(name, of_kind.get(name, {}))


@functools.cache
def _tuned_by_kind(operation: str) -> dict[str, dict[str, dict[str, int]]]:
    file = file_of(operation)
    return json.loads(file.read_text()) if file.exists() else {}


def file_of(operation: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    """The file of an operation's tuned tiles; by default the one that its kernels use."""
    return (folder or pathlib.Path(__file__).parent) / operation / "tiles.json"


def ceil_div(size: int, part: int) -> int:
    """The number of parts that cover size."""
    return -(-size // part)


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least value."""
    return 1 << max(0, int(value) - 1).bit_length()  # numbers of NumPy have no bit_length
