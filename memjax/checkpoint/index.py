"""The index of a step: the item that describes the others."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import NonNegativeInt, PositiveInt

from memjax.checkpoint.blocks import block_rows
from memjax.checkpoint.digests import array_digests, text_digest
from memjax.io.documents import read_as

INDEX = "digests"
"""Name of the item."""


class Note(NamedTuple):
    """What the index records about the step as a whole."""

    loss: float | None
    partial: bool


@dataclasses.dataclass
class _Leaf:
    shape: list[NonNegativeInt]
    dtype: str
    block_rows: PositiveInt
    digest: str


@dataclasses.dataclass
class _Index:
    """The schema of an index."""

    arrays: dict[str, dict[str, _Leaf]]
    documents: dict[str, str]
    loss: float | None
    partial: bool = False
    step: int | None = None


def describe(leaves: Mapping[str, Any], most_bytes: int) -> dict[str, Any]:
    """Shape, dtype, rows per block and digest of every leaf of one item.

    Raises:
        TypeError: a leaf is not a `jax.Array`.
    """
    if other := [name for name, leaf in leaves.items() if not isinstance(leaf, jax.Array)]:
        raise TypeError(f"not a jax.Array: {', '.join(other)}")
    digests = array_digests(leaves)
    item_bytes = sum(leaf.nbytes for leaf in leaves.values())
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": leaf.dtype.name,
            "block_rows": block_rows(leaf, item_bytes, most_bytes),
            "digest": digests[name],
        }
        for name, leaf in leaves.items()
    }


def differences(item: str, records: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A line for every leaf whose saved shape or type is not the wanted one, or that only one side has."""
    saved = {name: f"{record['dtype']}{record['shape']}" for name, record in records.items()}
    asked = {name: f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in wanted.items()}
    return [
        f"{item}/{name[:200]}: saved {saved.get(name, 'nothing')[:100]}, wanted {asked.get(name, 'nothing')}"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]


def seal(index: Mapping[str, Any]) -> dict[str, Any]:
    """The stored form of the index, with its own digest."""
    return {"index": index, "digest": text_digest(index)}


def unseal(stored: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The index in what is stored. Early steps, whose indices lack a step number, may have been renamed unnoticed.

    Raises:
        ValueError, TypeError, KeyError: it is no index, was changed after `seal`, or belongs to another step.
    """
    index = stored["index"]
    read_as(_Index, index)
    for leaves in index["arrays"].values():
        for leaf in leaves.values():
            jnp.dtype(leaf["dtype"])
    if text_digest(index) != stored["digest"]:
        raise ValueError("its digest differs")
    if index.get("step", step) != step:
        raise ValueError(f"it was saved as step {index['step']}, so the folder was renamed")
    return index


def note_of(index: Mapping[str, Any]) -> Note:
    """The note in an index; steps saved before partial ones existed are complete."""
    return Note(index["loss"], index.get("partial", False))
