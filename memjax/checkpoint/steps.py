"""Which steps a folder holds, which of them are complete, which is the best, and which are kept."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from memjax.checkpoint.errors import Damaged, explained
from memjax.checkpoint.index import Note, note_of
from memjax.checkpoint.restoring import StoredStep
from memjax.errors import CheckpointError


class Steps:
    """The steps of one folder. What their indices say is read once.

    Methods take all steps on disk, or those that are given.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        # Without `..`, which TensorStore refuses and Orbax takes out as if no folder before it were a link.
        self.folder = pathlib.Path(os.path.realpath(folder))
        self._notes: dict[int, Note] = {}

    def steps(self) -> list[int]:
        """Every step on disk, ascending; a step still being written is not among them."""
        with explained(CheckpointError, f"{self.folder}: cannot be listed"):
            if not self.folder.is_dir():
                return []
            # Orbax renames a step's folder to its number when it is complete, and moves it away whole to delete it.
            return sorted(int(path.name) for path in self.folder.iterdir() if _is_step(path.name) and path.is_dir())

    def complete(self, steps: Iterable[int] | None = None) -> list[int]:
        """The steps that are not partial; one whose index cannot be read is taken for complete."""
        return [step for step in self._all(steps) if not self.is_partial(step)]

    def readable(self, steps: Iterable[int] | None = None) -> list[int]:
        """The steps whose index can be read; their contents may still be damaged."""
        return [step for step in self._all(steps) if self._note(step) is not None]

    def latest(self) -> int | None:
        """The newest complete step whose index can be read."""
        return max(self.readable(self.complete()), default=None)

    def best(self, steps: Iterable[int] | None = None) -> int | None:
        """The complete step with the lowest loss, the newer one of equals; None when none has a loss."""
        notes = {step: self._note(step) for step in self._all(steps)}
        losses = [(n.loss, -step) for step, n in notes.items() if n and n.loss is not None and not n.partial]
        return -min(losses)[1] if losses else None

    def newest_with(self, item: str) -> int | None:
        """The newest step, partial or not, whose index can be read and names an item of arrays; None when none does."""
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
        """Takes the note of a step that is about to be written."""
        self._notes[step] = note

    def _all(self, steps: Iterable[int] | None) -> Iterable[int]:
        return self.steps() if steps is None else steps

    def _note(self, step: int) -> Note | None:
        if step not in self._notes:
            try:
                self._notes[step] = note_of(StoredStep(self.folder, step).index)
            except Damaged:
                return None  # asked again, because the reason may pass
        return self._notes[step]


def _is_step(name: str) -> bool:
    """Whether a folder's name is a number as saving writes it: no leading zeros, no digits of other scripts."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


class Retention:
    """Orbax's preservation policy: the latest steps, the latest complete ones, and the best."""

    def __init__(self, steps: Steps, *, keep: int, keep_best: bool) -> None:
        self._steps, self._keep, self._keep_best = steps, keep, keep_best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of Orbax's checkpoints whether it stays."""
        del context
        steps = sorted(info.step for info in checkpoints)
        best = self._steps.best(steps) if self._keep_best else None
        # A step that cannot be read does not count as one that is kept.
        complete = self._steps.complete(self._steps.readable(steps))
        kept = {*steps[-self._keep :], *complete[-self._keep :], best}
        return [info.step in kept for info in checkpoints]
