"""Compute a patch from two versions of tables, and overlay patches on tables."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.errors import CheckpointError
from memjax.runs.patches.patch import Patch, RowChange

_SHOWN = 5
"""Most rows that a message names."""


def between(old: Mapping[str, Array], new: Mapping[str, Array], *, base: str, notes: Mapping[str, Any]) -> Patch:
    """The patch that turns the old tables into new ones of the same shapes and types.

    Raises:
        CheckpointError: a new row is not finite.
    """
    changes = {}
    for name, table in old.items():
        rows = np.flatnonzero(jax.device_get(_differs(table, new[name])))
        if rows.size:
            before, after = (np.asarray(jax.device_get(array[rows])) for array in (table, new[name]))
            if not np.isfinite(after.astype(np.float64)).all():
                raise CheckpointError(f"table {name}: the new rows are not finite; a patch cannot hold them")
            changes[name] = RowChange(table.shape[0], rows.astype(np.int64), before, after)
    return Patch(base, changes, notes)


@jax.jit
def _differs(old: Float[Array, "n d"], new: Float[Array, "n d"]) -> Array:
    """Mask of the rows that differ in any bit."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[old.dtype.itemsize]
    left, right = (jax.lax.bitcast_convert_type(array, unsigned) for array in (old, new))
    return jnp.any(left != right, axis=1)


def overlay(tables: Mapping[str, Array], patches: Sequence[tuple[str, Patch]], *, base: str) -> dict[str, Array]:
    """Applies patches to tables, in order; the given arrays of changed tables are donated. `base` is the digest of the
    checkpoint that the tables are from.

    Raises:
        CheckpointError: a patch is for another model, or the rows it replaces are not what it expects.
    """
    tables, done = dict(tables), []
    for label, patch in patches:
        if patch.base != base:
            raise CheckpointError(
                f"{label}: was made for another model: for the digest {patch.base[:16]}, this one has {base[:16]}"
            )
        for name, change in patch.tables.items():
            table = tables.get(name)
            found = None if table is None else (*table.shape, table.dtype.name)
            wanted = (change.num_slots, change.new.shape[1], change.new.dtype.name)
            if table is None or found != wanted:
                raise CheckpointError(f"{label}: is for a table {name} of {wanted}, the model has {found}")
            now = np.asarray(jax.device_get(table[change.rows]))
            if now.tobytes() != change.old.tobytes():
                raise CheckpointError(f"{label}: {_why_not(name, change, now, done)}")
            tables[name] = _replaced(table, change.rows, change.new)
        done.append((label, patch))
    return tables


def _why_not(name: str, change: RowChange, now: np.ndarray, done: Sequence[tuple[str, Patch]]) -> str:
    is_other = (now.view(np.uint8) != change.old.view(np.uint8)).any(axis=1)
    other = change.rows[is_other]
    for label, patch in done:
        if name in patch.tables and len(shared := np.intersect1d(other, patch.tables[name].rows)):
            return f"{label} has changed {named_rows(name, shared)} too; merge the two, or leave one out"
    return f"{named_rows(name, other)} are not what the patch was made for"


def named_rows(table: str, rows: np.ndarray) -> str:
    """Some rows of a table, for messages."""
    shown = ", ".join(map(str, rows[:_SHOWN].tolist())) + (", ..." if len(rows) > _SHOWN else "")
    return f"{len(rows):,} rows of table {table} ({shown})"


@functools.partial(jax.jit, donate_argnums=0)
def _replaced(table: Float[Array, "n d"], rows: Int[Array, " u"], new: Float[Array, "u d"]) -> Float[Array, "n d"]:
    return table.at[rows].set(new, unique_indices=True, indices_are_sorted=True)
