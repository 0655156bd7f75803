"""Patch files: table rows to replace, their old values, and the digest of the model."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, Int

from memjax.errors import CheckpointError
from memjax.io.documents import line_of
from memjax.io.files import check_regular, write_atomic
from memjax.io.paths import local_path

FILE_NAME = "patch.safetensors"
"""The patch file in a folder given as a patch."""
_KEY, _VERSION = "memjax.patch", 1


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class RowChange:
    """The rows of one table that a patch replaces."""

    num_slots: int
    """Rows of the whole table."""
    rows: Int[np.ndarray, " n"]
    """Indices of the rows, ascending."""
    old: Float[np.ndarray, "n d"]
    """Their values before, in the dtype of the table."""
    new: Float[np.ndarray, "n d"]
    """Their values after."""

    @property
    def digest(self) -> str:
        """Digest of the row indices and the old values."""
        return _digest(self.rows, self.old)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Patch:
    """Rows that replace others in the tables of one model."""

    base: str
    """Digest of the checkpoint that it was made for (`model_digest`)."""
    tables: Mapping[str, RowChange]
    """By table name; unchanged tables are left out."""
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Provenance, as JSON values."""

    @property
    def num_rows(self) -> int:
        """Number of rows changed in all tables."""
        return sum(len(change.rows) for change in self.tables.values())

    def shared_rows(self, other: "Patch") -> dict[str, Int[np.ndarray, " n"]]:
        """The rows that both patches change, by table; tables without such rows are left out."""
        names = [name for name in self.tables if name in other.tables]
        rows = {name: np.intersect1d(self.tables[name].rows, other.tables[name].rows) for name in names}
        return {name: found for name, found in rows.items() if len(found)}

    def to_bytes(self) -> bytes:
        """The content of the patch file."""
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
        """16 hex digits that differ between patches with different effects."""
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
    """The file that a path names: the path itself if it ends in .safetensors, else `patch.safetensors` in that folder.

    Raises:
        CheckpointError: the path is not local.
    """
    found = local_path(path, "patch", CheckpointError)
    return found if found.suffix == ".safetensors" and not found.is_dir() else found / FILE_NAME


def is_patch(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an existing patch file."""
    try:
        return patch_file(path).is_file()
    except CheckpointError:
        return False


def write_patch(path: str | os.PathLike[str], patch: Patch) -> pathlib.Path:
    """Writes the file atomically and returns its path."""
    return write_atomic(patch_file(path), patch.to_bytes())


def read_patch(path: str | os.PathLike[str]) -> Patch:
    """Reads what `write_patch` wrote, and validates all of it.

    Raises:
        CheckpointError: there is no such file, or it is not a patch that could be applied to any model.
    """
    file = patch_file(path)
    try:
        check_regular(os.stat(file), file)
        with safetensors.safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file; name a patch that learn or patch has written") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path}: is not a patch, whose file ends in .safetensors") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the library raises its own errors and NumPy's
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
        raise ValueError(f"its version is {version!r:.40}, this version of memjax reads {_VERSION}")
    base, sizes, notes = document["base"], document["tables"], document["notes"]
    if not isinstance(base, str) or not isinstance(sizes, dict) or not isinstance(notes, dict):
        raise ValueError("base must be a string, tables and notes must be objects")
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
        raise ValueError(
            f"table {name}: old and new rows must have the same type and shape, one for each index: {shapes}"
        )
    if not jnp.issubdtype(new.dtype, jnp.floating):
        raise ValueError(f"table {name}: rows of {new.dtype} are not floating-point numbers")
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_slots or np.any(rows[1:] <= rows[:-1])):
        raise ValueError(f"table {name}: row indices must ascend within 0..{num_slots - 1}")
    if not np.isfinite(new.astype(np.float64)).all():
        raise ValueError(f"table {name}: its new rows hold values that are not finite")
    return RowChange(num_slots, rows, old, new)
