"""The patches applied to the checkpoints of a run: copies of their files, and the list that `load` reads.

Checkpoints are never rewritten. A patch is applied while its name is in the list. The list is replaced atomically:
whenever a process dies, the model is either the one before or the one after.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import pydantic
from jaxtyping import Array

from memjax.checkpoint.digests import text_digest
from memjax.checkpoint.restoring import StoredStep
from memjax.errors import CheckpointError
from memjax.io.documents import line_of, listed
from memjax.io.files import check_inside, read_text, write_atomic
from memjax.io.lock import Locked, locked
from memjax.runs.layout import PARAMS, TABLES, run_folder
from memjax.runs.patches.patch import Patch, patch_file, read_patch
from memjax.runs.patches.tables import overlay

FOLDER, _LIST = "patches", "applied.json"
"""The subfolder of a run with its applied patches, and the list of them."""
_LISTED = pydantic.TypeAdapter(dict[str, list[Annotated[str, pydantic.Field(pattern="^[0-9a-f]{16}$")]]])
_WAY_OUT = "correct it, or delete it and apply the patches again: without it none is applied"


class Applied:
    """The patches applied to the checkpoints in a folder, in order, by step."""

    def __init__(self, checkpoints: pathlib.Path):
        self.checkpoints, self.folder = checkpoints, run_folder(checkpoints) / FOLDER

    def names(self, step: int) -> list[str]:
        """The identities of the patches, in the order in which they were applied.

        Raises:
            CheckpointError: the list cannot be read.
        """
        return self._read().get(str(step), [])

    def file(self, name: str) -> pathlib.Path:
        """Path of the stored copy of a patch."""
        return self.folder / f"{name}.safetensors"

    def patches(self, step: int) -> list[tuple[str, Patch]]:
        """The patches, each with a label for messages; CheckpointError if one cannot be read."""
        return [(f"patch {name}", self.patch(name)) for name in self.names(step)]

    def patch(self, name: str) -> Patch:
        """Reads the stored copy of a patch; CheckpointError if it cannot be read."""
        try:
            return read_patch(self.file(name))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}\nit is a copy of a patch that is applied to this run: copy the patch there again, or "
                f"remove {name} from {self.folder / _LIST}"
            ) from error

    def add(self, step: int, patch: Patch) -> None:
        """Applies a patch, which must fit, after the others."""
        write_atomic(self.file(patch.identity), patch.to_bytes())
        self._write(step, [*self.names(step), patch.identity])

    def remove(self, step: int, name: str) -> None:
        """Reverts a patch."""
        self._write(step, [other for other in self.names(step) if other != name])
        if not any(name in names for names in self._read().values()):
            self.file(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keeps other processes from changing the list.

        Raises:
            CheckpointError: another process is changing it.
            OSError: the folder cannot be written, or is a link to somewhere else.
        """
        check_inside(self.folder, self.folder.parent)
        try:
            with locked(self.folder / ".lock"):
                yield
        except Locked as error:
            raise CheckpointError(f"{self.folder}: is being changed by {error}") from None

    def _read(self) -> dict[str, list[str]]:
        path = self.folder / _LIST
        try:
            return _LISTED.validate_json(read_text(path), strict=True)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = listed(error) if isinstance(error, pydantic.ValidationError) else line_of(error)
            raise CheckpointError(f"{path}: cannot be read ({reason}); {_WAY_OUT}") from error

    def _write(self, step: int, names: Sequence[str]) -> None:
        entries = self._read() | {str(step): list(names)}
        entries = {number: listed for number, listed in entries.items() if listed}
        write_atomic(self.folder / _LIST, json.dumps(entries, indent=1) + "\n")


def patched(
    tables: Mapping[str, Array], checkpoints: pathlib.Path, step: int, patches: Sequence[str | os.PathLike[str]]
) -> dict[str, Array]:
    """The tables of a checkpoint with the patches applied to it, then those given; donates the tables.

    Raises:
        CheckpointError: a patch cannot be read or does not fit.
    """
    found = Applied(checkpoints).patches(step)
    known = {patch.identity for _, patch in found}
    for path in patches:
        patch = read_patch(path)
        if patch.identity in known:
            raise CheckpointError(f"{patch_file(path)}: is already applied, as patch {patch.identity}")
        known.add(patch.identity)
        found.append((str(patch_file(path)), patch))
    return overlay(tables, found, base=model_digest(checkpoints, step)) if found else dict(tables)


def model_digest(checkpoints: pathlib.Path, step: int) -> str:
    """The digest of a checkpoint's parameters and tables, without patches.

    Raises:
        CheckpointError: the step's index cannot be read.
    """
    arrays = StoredStep(checkpoints, step).index["arrays"]
    return text_digest(
        {
            item: {name: leaf["digest"] for name, leaf in arrays[item].items()}
            for item in (PARAMS, TABLES)
            if item in arrays
        }
    )
