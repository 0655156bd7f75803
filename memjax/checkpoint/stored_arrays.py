"""Reading the arrays of an item from the database of TensorStore (OCDBT) in which Orbax stores them.

Orbax's own reading would parse the metadata of all arrays at every call, and a table of many blocks takes many calls.
Read from TensorStore, arrays come as fast as its threads read and unpack them.
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
"""Most bytes of the database's nodes that are kept, so that looking arrays up reads none twice."""
_LEAST_AHEAD, _MOST_AHEAD, _AHEAD_SHARE = 16 << 20, 1 << 30, 32
"""Bytes of an item that are read at once: one part in so many, within these bounds. Resuming should need no more memory
than beginning."""


_Reading = collections.deque[tuple[list[int], "ts.Future[np.ndarray]", int]]
"""Where parts begin, what is read of them, and their bytes."""


class Part(NamedTuple):
    """What was read of an array: the part that this process needs, and where it begins."""

    starts: list[int]
    values: np.ndarray

    def at(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The values at an index into the whole array, of that shape."""
        bounds = zip(_bounds(index, shape), self.starts, strict=True)
        return self.values[..., *(slice(first - start, last - start) for (first, last), start in bounds)]


def read_arrays(folder: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[jax.Array]:
    """The arrays of an item, by their stored names, one after the other, under their shardings.

    Raises:
        ValueError: an array is missing, cannot be read, or has another shape or type.
    """
    parts = read_parts(folder, wanted)
    for target in wanted.values():
        yield _on_devices(target, next(parts))


def read_parts(folder: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[Part]:
    """What `read_arrays` puts on this process's devices, in host memory; all of an array without a sharding.

    While one is used, the next ones are read.
    """
    context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": _NODES_BYTES}})
    opening = [ts.open(_place(folder, name), read=True, open=True, context=context) for name in wanted]
    total = sum(_num_bytes(target.shape, target) for target in wanted.values())
    most = min(max(_LEAST_AHEAD, total // _AHEAD_SHARE), _MOST_AHEAD)
    reading: _Reading = collections.deque()
    for (name, target), opened in zip(wanted.items(), opening, strict=True):
        array = opened.result()
        # Each piece is unpacked whole, so that of a hostile file one could take all memory.
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


# Functions of their own, after which nothing holds a part while the next is waited for.
def _on_devices(target: jax.ShapeDtypeStruct, part: Part) -> jax.Array:
    at = lambda index: part.at(index, target.shape)
    return jax.make_array_from_callback(target.shape, target.sharding, at, dtype=target.dtype)


def _first(reading: _Reading) -> Part:
    starts, read, _ = reading.popleft()
    return Part(starts, read.result())


def _place(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The specification of an array, as Orbax writes it."""
    base = {"driver": "file", "path": f"{folder}/"}
    database = {"driver": "ocdbt", "base": base, "path": name.replace("/", "."), "cache_pool": "cache_pool#nodes"}
    return {"driver": "zarr", "kvstore": database, "fill_missing_data_reads": False}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]


def _bounds_here(target: jax.ShapeDtypeStruct) -> list[tuple[int, int]]:
    """First and last place, along every axis, of what the devices of this process hold."""
    if target.sharding is None:
        return [(0, size) for size in target.shape]
    indices = target.sharding.addressable_devices_indices_map(target.shape).values()
    axes = zip(*(_bounds(index or (), target.shape) for index in indices), strict=True)
    return [(min(first for first, _ in axis), max(last for _, last in axis)) for axis in axes]


def _num_bytes(shape: Any, target: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape) * target.dtype.itemsize
