"""Reads the arrays of an item directly from the TensorStore database (OCDBT) in which Orbax stores them.

Orbax itself would parse the metadata of all arrays at every call, and a table of many blocks needs many calls. With
TensorStore, the only limit is how fast its threads read and decompress.
"""

import collections
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

_NODES_BYTES = 100 << 20
"""Cache for nodes of the database, so that lookups of arrays do not read a node twice."""
_LEAST_AHEAD, _MOST_AHEAD, _AHEAD_SHARE = 16 << 20, 1 << 30, 32
"""Bytes of an item that are read ahead: 1 / `_AHEAD_SHARE` of it, within these bounds, so that resuming needs no more
memory than a fresh start."""


_Reading = collections.deque[tuple[list[int], "ts.Future[np.ndarray]", int]]
"""Parts being read: start indices, future values, and bytes."""


class Part(NamedTuple):
    """The part of an array that this process needs, and its start index along each axis."""

    starts: list[int]
    values: np.ndarray

    def at(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The values at an index into the whole array, whose shape is `shape`."""
        bounds = zip(_bounds(index, shape), self.starts, strict=True)
        return self.values[..., *(slice(first - start, last - start) for (first, last), start in bounds)]


def read_arrays(folder: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[jax.Array]:
    """Yields the arrays of an item with these stored names, in order, with the wanted shardings.

    Raises:
        ValueError: an array is missing, cannot be read, or has another shape or type.
    """
    parts = read_parts(folder, wanted)
    for target in wanted.values():
        yield _on_devices(target, next(parts))


def read_parts(folder: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[Part]:
    """Yields, in host memory, the parts that this process's devices need; for arrays without a sharding, all of them.

    While the caller uses a part, the next ones are read in the background.
    """
    context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": _NODES_BYTES}})
    opening = [ts.open(_place(folder, name), read=True, open=True, context=context) for name in wanted]
    total = sum(_num_bytes(target.shape, target) for target in wanted.values())
    most = min(max(_LEAST_AHEAD, total // _AHEAD_SHARE), _MOST_AHEAD)
    reading: _Reading = collections.deque()
    for (name, target), opened in zip(wanted.items(), opening, strict=True):
        array = opened.result()
        # A chunk is decompressed as a whole, so an oversized one in a hostile file could exhaust memory.
        piece = [size or 1 for size in array.chunk_layout.read_chunk.shape or ()]
        is_larger = math.prod(piece) > max(1, math.prod(target.shape))
        if is_larger or (array.shape, array.dtype.numpy_dtype) != (target.shape, target.dtype):
            raise ValueError(f"{name} is {array.dtype.name}{list(array.shape)} in pieces of {piece}")
        bounds = _bounds_here(target)
        size = _num_bytes([last - first for first, last in bounds], target)
        while reading and size + sum(each for _, _, each in reading) > most:
            yield _first(reading)
        part = array[tuple(slice(*each) for each in bounds)]
        reading.append(([first for first, _ in bounds], part.read(), size))
    while reading:
        yield _first(reading)


# Separate functions, so that no local variable keeps a part alive while the next is awaited.
def _on_devices(target: jax.ShapeDtypeStruct, part: Part) -> jax.Array:
    at = lambda index: part.at(index, target.shape)
    return jax.make_array_from_callback(target.shape, target.sharding, at, dtype=target.dtype)


def _first(reading: _Reading) -> Part:
    starts, read, _ = reading.popleft()
    return Part(starts, read.result())


def _place(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """TensorStore's specification of an array written by Orbax."""
    base = {"driver": "file", "path": f"{folder}/"}
    database = {"driver": "ocdbt", "base": base, "path": name.replace("/", "."), "cache_pool": "cache_pool#nodes"}
    return {"driver": "zarr", "kvstore": database, "fill_missing_data_reads": False}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]


def _bounds_here(target: jax.ShapeDtypeStruct) -> list[tuple[int, int]]:
    """Start and end, along every axis, of the part that this process's devices hold."""
    if target.sharding is None:
        return [(0, size) for size in target.shape]
    indices = target.sharding.addressable_devices_indices_map(target.shape).values()
    axes = zip(*(_bounds(index or (), target.shape) for index in indices), strict=True)
    return [(min(first for first, _ in axis), max(last for _, last in axis)) for axis in axes]


def _num_bytes(shape: Any, target: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape) * target.dtype.itemsize
