"""Digests of documents and of arrays; those of arrays are the same on every mesh."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding


def text_digest(document: Any) -> str:
    """The digest of a JSON document, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_FEW_ELEMENTS = 1 << 16
"""Up to this size, NumPy takes less time than XLA's compilation for one shape."""


def array_digests(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """The digest of every leaf, computed on the devices that hold it."""
    compile_digests(leaves.values())
    sums = jax.device_get(
        {name: (_of_few if _is_small(leaf) else _program(_kind(leaf)))(leaf) for name, leaf in leaves.items()}
    )
    return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in sums.items()}


def compile_digests(leaves: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> None:
    """Compiles, in parallel, the programs that `array_digests` runs for leaves of these shapes, types and shardings."""
    with ThreadPoolExecutor() as threads:
        list(threads.map(_program, {_kind(leaf) for leaf in leaves if not _is_small(leaf)}))


class RowsDigest:
    """Computes the same digest as `array_digests` from an array's rows, block by block."""

    def __init__(self) -> None:
        self._sums = (0, 0)

    def add(self, rows: np.ndarray, start: int) -> None:
        """Adds rows, of which the first has index `start`."""
        found = jax.device_get(_digest(rows, np.uint32(start)))
        self._sums = tuple((old + int(new)) % 2**32 for old, new in zip(self._sums, found, strict=True))

    def hex(self) -> str:
        return "".join(f"{number:08x}" for number in self._sums)


@jax.jit
def _digest(array: jax.Array, first: Any = 0) -> tuple[jax.Array, jax.Array]:
    """Two 32-bit sums over the elements, the same on every mesh; `first` is the index of the first row.

    Each word is mapped by a bijection that depends on its position, so a change within one word always changes the
    digest; any other change goes undetected with probability 2**-64. Integer sums do not depend on their order.
    """
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)  # 8 bytes: a last axis of two words
    place = jnp.uint32(words.ndim)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + (np.uint32(0) if axis else first)
        place = _scramble(place + index + np.uint32(axis + 1))
    mixed = _scramble(words ^ place)
    # One reduction for both: with two, XLA keeps the words in memory to use them twice.
    zero, axes = np.uint32(0), tuple(range(words.ndim))
    return jax.lax.reduce((mixed, mixed * (place | np.uint32(1))), (zero, zero), _add_both, axes)


class _Kind(NamedTuple):
    """The properties of an array that its compiled program depends on."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding


def _kind(leaf: jax.Array | jax.ShapeDtypeStruct) -> _Kind:
    return _Kind(leaf.shape, np.dtype(leaf.dtype), leaf.sharding)


@functools.cache
def _program(kind: _Kind) -> jax.stages.Compiled:
    with jax.enable_x64(kind.dtype.itemsize == 8):  # the caller's setting is thread-local
        return _digest.lower(jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=kind.sharding)).compile()


def _is_small(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether NumPy can read a leaf without a copy, and digests it faster than XLA could compile."""
    sharding = leaf.sharding
    on_one = jax.default_backend() == "cpu" and sharding.is_fully_addressable and len(sharding.device_set) == 1
    return on_one and leaf.size <= _FEW_ELEMENTS and leaf.dtype.itemsize <= 4


def _of_few(array: jax.Array) -> tuple[np.uint32, np.uint32]:
    """`_digest` in NumPy."""
    values = np.asarray(array)
    words = values.view(f"u{values.itemsize}").astype(np.uint32)
    with np.errstate(over="ignore"):
        place = np.full(words.shape, words.ndim, np.uint32)
        for axis, size in enumerate(words.shape):
            index = np.arange(size, dtype=np.uint32).reshape([-1, *[1] * (words.ndim - axis - 1)])
            place = _scramble(place + index + np.uint32(axis + 1))
        mixed = _scramble(words ^ place)
        return np.sum(mixed, dtype=np.uint32), np.sum(mixed * (place | np.uint32(1)), dtype=np.uint32)


def _add_both(left: Any, right: Any) -> Any:
    return left[0] + right[0], left[1] + right[1]


def _scramble(words: Any) -> Any:
    """A bijection of 32-bit words in which every output bit depends on every input bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(factor)
    return words ^ (words >> np.uint32(16))
