"""Streaming of large arrays: split into row blocks when written, joined when read."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.sharding.rules import without_first_axis

BLOCK_BYTES = 2 << 30
"""Largest array that is stored in one piece: Orbax refuses single arrays near 96 GB."""

_SMALL_BYTES = 16 << 20
"""Arrays up to this size are never split."""

BLOCKS = 512
"""Target number of blocks per item: while one is read, host memory holds about four copies of it."""


def block_rows(leaf: jax.Array, item_bytes: int, most_bytes: int) -> int:
    """Rows per block of a leaf, at least one; a block has at most `most_bytes`, fewer in a smaller item."""
    block_bytes = min(most_bytes, max(_SMALL_BYTES, item_bytes // BLOCKS))
    return max(1, block_bytes // max(1, leaf.dtype.itemsize * math.prod(leaf.shape[1:])))


def blocks(name: str, record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """First row and number of rows by stored name; a single block has the leaf's own name, an empty leaf no blocks."""
    shape, step = record["shape"], record["block_rows"]
    if 0 in shape:
        return {}
    if not shape or shape[0] <= step:
        return {name: (0, shape[0] if shape else 1)}
    return {f"{name}/rows_{start:08d}": (start, min(step, shape[0] - start)) for start in range(0, shape[0], step)}


def split_blocks(leaves: Mapping[str, jax.Array], records: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays to store, by stored name: unsplit leaves as they are, and copies of the blocks of the others."""
    stored = {}
    for name, leaf in leaves.items():
        places = blocks(name, records[name])
        for piece, (start, rows) in places.items():
            stored[piece] = leaf if len(places) == 1 else _copy_rows(leaf, start, rows)
    return stored


def block_targets(
    target: jax.ShapeDtypeStruct, places: Mapping[str, tuple[int, int]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a leaf's blocks, by stored name."""
    if len(places) == 1:
        return dict.fromkeys(places, target)
    sharding = without_first_axis(target.sharding)
    of = lambda rows: jax.ShapeDtypeStruct((rows, *target.shape[1:]), target.dtype, sharding=sharding)
    return {piece: of(rows) for piece, (_, rows) in places.items()}


def join_blocks(
    target: jax.ShapeDtypeStruct, places: Mapping[str, tuple[int, int]], found: Iterator[jax.Array]
) -> jax.Array:
    """The leaf, joined from its blocks, which are written one by one into a donated array."""
    if not places:
        empty = np.zeros(target.shape, target.dtype)  # a compiled program would not split it over the devices
        return jax.make_array_from_callback(target.shape, target.sharding, lambda index: empty[index])
    if len(places) == 1:
        return next(found)
    leaf = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=target.sharding)(target.shape, target.dtype)
    put = jax.jit(_put_rows, donate_argnums=0, out_shardings=target.sharding)
    for start, _ in places.values():
        leaf = put(leaf, next(found), start)
    return leaf


def _copy_rows(leaf: jax.Array, start: int, rows: int) -> jax.Array:
    take = jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=without_first_axis(leaf.sharding))
    block = take(leaf, start, rows)
    kinds = {memory.kind for memory in next(iter(block.sharding.device_set)).addressable_memories()}
    if jax.default_backend() != "cpu" and "pinned_host" in kinds:
        # Blocks leave the device one at a time; together they would double the table's memory there.
        block = jax.device_put(block, block.sharding.with_memory_kind("pinned_host"))
    return block.block_until_ready()


def _put_rows(leaf: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(leaf, block, start, 0)
