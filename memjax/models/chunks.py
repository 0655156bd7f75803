"""Runs a function over chunks of the sequence axis, so that less is in memory at once."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

T = TypeVar("T")


def by_chunks(function: Callable[..., T], chunks: int, *arrays: Array) -> T:
    """function(*arrays), one chunk of tokens after the other; the sharding of the batch is unchanged."""
    if chunks == 1:
        return function(*arrays)
    out = jax.lax.map(lambda parts: function(*parts), tuple(split(array, chunks) for array in arrays))
    return jax.tree.map(lambda pieces: join(pieces, arrays[0].shape[1]), out)


def split(array: Float[Array, "b s *rest"] | Int[Array, "b s"], chunks: int) -> Array:
    """Splits the sequence axis into `chunks` equal pieces, on a new first axis; the last is padded with zeros."""
    length = array.shape[1]
    each = -(-length // chunks)
    padded = jnp.pad(array, [(0, 0), (0, chunks * each - length), *[(0, 0)] * (array.ndim - 2)])
    return jnp.moveaxis(padded.reshape(array.shape[0], chunks, each, *array.shape[2:]), 1, 0)


def join(pieces: Shaped[Array, "pieces b each *rest"], length: int) -> Array:
    """Inverse of `split`."""
    joined = jnp.moveaxis(pieces, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
