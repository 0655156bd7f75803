"""Patches: files with the rows of tables that replace others, what these others were, and the model they belong to."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, Int

from memjax.errors import CheckpointError
from memjax.io.documents import line_of
from memjax.io.files import check_regular, write_atomic
from memjax.io.paths import local_path

FILE_NAME = "patch.safetensors"
"""The file in a folder that is named as a patch."""
_KEY, _VERSION = "memjax.patch", 1
_SHOWN = 5
"""Rows that a message names."""

Rule = Literal["refuse", "sum", "first", "last"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class RowChange:
    """The rows of one table that a patch replaces."""

    num_slots: int
    """Rows of the whole table."""
    rows: Int[np.ndarray, " n"]
    """Which, ascending."""
    old: Float[np.ndarray, "n d"]
    """Their values before, in the dtype of the table."""
    new: Float[np.ndarray, "n d"]
    """Their values after."""

    @property
    def digest(self) -> str:
        """Digest of the row numbers and the old values."""
        return _digest(self.rows, self.old)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Patch:
    """Rows that replace others in the tables of one model."""

    base: str
    """Digest of the checkpoint that it was made for (`model_digest`)."""
    tables: Mapping[str, RowChange]
    """By the name of the table; those without a change are left out."""
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Provenance, as JSON values."""

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(len(change.rows) for change in self.tables.values())

    def to_bytes(self) -> bytes:
        """The content of its file."""
        arrays, sizes = {}, {}
        for name, change in self.tables.items():
            arrays |= {
                f"{name}/rows": change.rows.astype(np.int64),
                f"{name}/old": change.old,
                f"{name}/new": change.new,
            }
            new = _digest(change.rows, change.new)
            sizes[name] = {"num_slots": change.num_slots, "old_digest": change.digest, "new_digest": new}
        document = {"version": _VERSION, "base": self.base, "tables": sizes, "notes": dict(self.notes)}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return safetensors.numpy.save(arrays, metadata={_KEY: json.dumps(document)})

    @property
    def identity(self) -> str:
        """16 hex digits that differ between patches that do different things."""
        parts = [self.base]
        for name, change in sorted(self.tables.items()):
            parts += [name, change.digest, _digest(change.rows, change.new)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _digest(rows: np.ndarray, values: np.ndarray) -> str:
    content = hashlib.sha256(np.ascontiguousarray(rows.astype("<i8")).data)
    content.update(f"{values.dtype.name}{values.shape}".encode())
    content.update(np.ascontiguousarray(values).view(np.uint8).data)
    return content.hexdigest()


def patch_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """The file that a path names: itself where it ends in .safetensors, else `patch.safetensors` in that folder.

    Raises:
        CheckpointError: the path is not local.
    """
    try:
        found = local_path(os.fspath(path), "patch")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return found if found.suffix == ".safetensors" and not found.is_dir() else found / FILE_NAME


def is_patch(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an existing file of a patch."""
    try:
        return patch_file(path).is_file()
    except CheckpointError:
        return False


def write_patch(path: str | os.PathLike[str], patch: Patch) -> pathlib.Path:
    """Writes the file, all of it or nothing, and returns its path."""
    return write_atomic(patch_file(path), patch.to_bytes())


def read_patch(path: str | os.PathLike[str]) -> Patch:
    """Reads what `write_patch` wrote; everything in it is checked.

    Raises:
        CheckpointError: there is no such file, or it is not a patch that could be applied to any model.
    """
    file = patch_file(path)
    try:
        check_regular(os.stat(file), file)
        with safetensors.safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file; name a patch that learn or patch has written") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the library raises kinds of its own, and whatever NumPy finds wrong
        raise CheckpointError(f"{file}: not a safetensors file, or a part of one ({line_of(error)})") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{file}: not a patch: its metadata has no {_KEY!r}")
    try:
        return _parse(json.loads(metadata[_KEY]), arrays)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else line_of(error)
        raise CheckpointError(f"{file}: not a patch: {reason}") from error


def _parse(document: Any, arrays: dict[str, np.ndarray]) -> Patch:
    """The patch of a file's metadata and arrays.

    Raises:
        ValueError, TypeError, KeyError: they do not describe a patch.
    """
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        version = document.get("version") if isinstance(document, dict) else document
        raise ValueError(f"its version is {version!r:.40}, this memjax reads {_VERSION}")
    base, sizes, notes = document["base"], document["tables"], document["notes"]
    if not isinstance(base, str) or not isinstance(sizes, dict) or not isinstance(notes, dict):
        raise ValueError("base must be a text, tables and notes must be objects")
    expected = {f"{name}/{part}" for name in sizes for part in ("rows", "old", "new")}
    if expected != arrays.keys():
        wrong = sorted(expected ^ arrays.keys())
        raise ValueError(f"its arrays and its metadata do not name the same tables: {', '.join(wrong)[:200]}")
    tables = {}
    for name, size in sizes.items():
        rows, old, new = (arrays[f"{name}/{part}"] for part in ("rows", "old", "new"))
        change = _checked(name, size["num_slots"], rows, old, new)
        if (change.digest, _digest(rows, new)) != (size["old_digest"], size["new_digest"]):
            raise ValueError(f"table {name}: its rows are not those that were written: the digests differ")
        tables[name] = change
    return Patch(base, tables, notes)


def _checked(name: str, num_slots: Any, rows: np.ndarray, old: np.ndarray, new: np.ndarray) -> RowChange:
    if type(num_slots) is not int or num_slots < 1:
        raise ValueError(f"table {name}: num_slots={num_slots!r:.40} must be a positive integer")
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise ValueError(f"table {name}: rows must be a list of int64, not {rows.dtype} {list(rows.shape)}")
    if old.dtype != new.dtype or old.shape != new.shape or old.ndim != 2 or len(old) != len(rows):
        shapes = f"{len(rows)} rows, old {old.dtype} {list(old.shape)}, new {new.dtype} {list(new.shape)}"
        raise ValueError(f"table {name}: old and new rows must be alike, and as many as there are numbers: {shapes}")
    if not jnp.issubdtype(new.dtype, jnp.floating):
        raise ValueError(f"table {name}: rows of {new.dtype} are no floating-point numbers")
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_slots or np.any(rows[1:] <= rows[:-1])):
        raise ValueError(f"table {name}: the numbers of rows must ascend within 0..{num_slots - 1}")
    if not np.isfinite(new.astype(np.float64)).all():
        raise ValueError(f"table {name}: its new rows hold values that are not finite")
    return RowChange(num_slots, rows, old, new)


def between(old: Mapping[str, Array], new: Mapping[str, Array], *, base: str, notes: Mapping[str, Any]) -> Patch:
    """The patch that turns tables into others of the same shapes and types.

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
    """The tables with the rows of patches, one patch after the other; the given arrays of changed tables are donated.

    Args:
        tables: rows by table, in the types in which they are stored.
        patches: with what messages call each.
        base: digest of the checkpoint that the tables are from.

    Raises:
        CheckpointError: a patch is for another model, or its rows are not what it expects them to be.
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
            return f"{label} has changed {_named(name, shared)} too; merge the two, or leave one out"
    return f"{_named(name, other)} are not what the patch was made for"


def _named(table: str, rows: np.ndarray) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN].tolist())) + (", ..." if len(rows) > _SHOWN else "")
    return f"{len(rows):,} rows of table {table} ({shown})"


@functools.partial(jax.jit, donate_argnums=0)
def _replaced(table: Float[Array, "n d"], rows: Int[Array, " u"], new: Float[Array, "u d"]) -> Float[Array, "n d"]:
    return table.at[rows].set(new, unique_indices=True, indices_are_sorted=True)


def merge(patches: Sequence[tuple[str, Patch]], *, conflicts: Rule = "refuse") -> Patch:
    """One patch that does what several do.

    Args:
        patches: of one base, with what messages call each.
        conflicts: what becomes of rows that several change. refuse: nothing, they are named; sum: the old row plus
            every change; first and last: the row of the first or the last patch.

    Raises:
        CheckpointError: patches are of different models, or change the same rows and `conflicts` is refuse.
    """
    first_label, first = patches[0]
    for label, patch in patches[1:]:
        if patch.base != first.base:
            bases = f"{first.base[:16]} and {patch.base[:16]}"
            raise CheckpointError(f"{first_label} and {label} were made for different models: {bases}")
    if conflicts == "refuse":
        found = [*_conflicts(patches)]
        if found:
            rule = "choose a rule for such rows (conflicts sum, first or last), or learn the facts of all together: "
            raise CheckpointError("\n".join([*found, f"{rule}`python -m memjax.learn RUN PATCHES --out PATCH`"]))
    names = dict.fromkeys(name for _, patch in patches for name in patch.tables)
    tables = {}
    for name in names:
        parts = [(label, patch.tables[name]) for label, patch in patches if name in patch.tables]
        tables[name] = _merged(name, parts, conflicts)
    sources = [{"patch": label, "identity": patch.identity, "notes": dict(patch.notes)} for label, patch in patches]
    return Patch(first.base, tables, {"made_by": "merge", "conflicts": conflicts, "sources": sources})


def _conflicts(patches: Sequence[tuple[str, Patch]]) -> Iterator[str]:
    for number, (label, patch) in enumerate(patches):
        for other_label, other in patches[:number]:
            for name in patch.tables.keys() & other.tables.keys():
                shared = np.intersect1d(patch.tables[name].rows, other.tables[name].rows)
                if len(shared):
                    yield f"{other_label} and {label} both change {_named(name, shared)}"


def _merged(name: str, parts: Sequence[tuple[str, RowChange]], conflicts: Rule) -> RowChange:
    label, like = parts[0]
    for other_label, part in parts[1:]:
        if (part.num_slots, part.new.shape[1], part.new.dtype) != (like.num_slots, like.new.shape[1], like.new.dtype):
            raise CheckpointError(f"{label} and {other_label} are for tables {name} of different shapes or types")
    rows = functools.reduce(np.union1d, [part.rows for _, part in parts])
    width = like.new.shape[1]
    old, new = np.zeros((2, len(rows), width), like.new.dtype)
    total, seen = np.zeros((len(rows), width)), np.zeros(len(rows), np.int64)
    for part_label, part in parts:
        at = np.searchsorted(rows, part.rows)
        again = seen[at] > 0
        if old[at[again]].tobytes() != part.old[again].tobytes():
            raise CheckpointError(f"{part_label}: expects other old rows of table {name} than those before it")
        old[at] = part.old
        new[at[~again] if conflicts == "first" else at] = part.new[~again] if conflicts == "first" else part.new
        total[at] += part.new.astype(np.float64) - part.old.astype(np.float64)
        seen[at] += 1
    if conflicts == "sum":
        several = seen > 1
        new[several] = (old[several].astype(np.float64) + total[several]).astype(new.dtype)
    return RowChange(like.num_slots, rows, old, new)
