"""The steps of a folder: which exist, which are complete, which is the best, and which to keep."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from memjax.checkpoint.errors import Damaged, explained
from memjax.checkpoint.index import Note, note_of
from memjax.checkpoint.restoring import StoredStep
from memjax.errors import CheckpointError
from memjax.io.paths import local_path


class Steps:
    """The steps of one folder, whose indices are read only once.

    Methods with the argument `steps` consider only these; None: all steps on disk.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        # Without `..`, which TensorStore refuses, and which Orbax resolves textually, ignoring links.
        self.folder = pathlib.Path(os.path.realpath(local_path(folder, "folder", CheckpointError)))
        self._notes: dict[int, Note] = {}

    def steps(self) -> list[int]:
        """All steps on disk, in ascending order, except one that is still being written."""
        with explained(CheckpointError, f"{self.folder}: cannot be listed"):
            if not self.folder.is_dir():
                return []
            # Orbax renames a step's folder to its number when it is complete, and moves it away whole to delete it.
            return sorted(int(path.name) for path in self.folder.iterdir() if _is_step(path.name) and path.is_dir())

    def complete(self, steps: Iterable[int] | None = None) -> list[int]:
        """The steps that are not partial; one whose index is unreadable counts as complete."""
        return [step for step in self._all(steps) if not self.is_partial(step)]

    def readable(self, steps: Iterable[int] | None = None) -> list[int]:
        """The steps whose index can be read; their contents may still be damaged."""
        return [step for step in self._all(steps) if self._note(step) is not None]

    def latest(self) -> int | None:
        """The newest complete step whose index can be read."""
        return max(self.readable(self.complete()), default=None)

    def best(self, steps: Iterable[int] | None = None) -> int | None:
        """The complete step with the lowest loss, of equals the newest; None if none has a loss."""
        notes = {step: self._note(step) for step in self._all(steps)}
        losses = [(n.loss, -step) for step, n in notes.items() if n and n.loss is not None and not n.partial]
        return -min(losses)[1] if losses else None

    def newest_with(self, item: str) -> int | None:
        """The newest step, partial or not, whose index is readable and has this item of arrays; None if none has."""
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                if item in StoredStep(self.folder, step).index["arrays"]:
                    return step
        return None

    def is_partial(self, step: int) -> bool:
        """Whether large items were left out of the step on purpose."""
        note = self._note(step)
        return note is not None and note.partial

    def _remember(self, step: int, note: Note) -> None:
        """Records the note of a step that is about to be written."""
        self._notes[step] = note

    def _all(self, steps: Iterable[int] | None) -> Iterable[int]:
        return self.steps() if steps is None else steps

    def _note(self, step: int) -> Note | None:
        if step not in self._notes:
            try:
                self._notes[step] = note_of(StoredStep(self.folder, step).index)
            except Damaged:
                return None  # not remembered, because the reason may be temporary
        return self._notes[step]


def _is_step(name: str) -> bool:
    """Whether a folder's name is a step number as written by saving: ASCII digits without leading zeros."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


class Retention:
    """Orbax's preservation policy: the latest steps, the latest complete ones, and the best."""

    def __init__(self, steps: Steps, *, keep: int, keep_best: bool) -> None:
        self._steps, self._keep, self._keep_best = steps, keep, keep_best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of Orbax's checkpoints."""
        del context
        steps = sorted(info.step for info in checkpoints)
        best = self._steps.best(steps) if self._keep_best else None
        # Unreadable steps do not count towards the complete ones to keep.
        complete = self._steps.complete(self._steps.readable(steps))
        kept = {*steps[-self._keep :], *complete[-self._keep :], best}
        return [info.step in kept for info in checkpoints]
