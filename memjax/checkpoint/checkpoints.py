"""The checkpoints of a run: what is saved, kept, found and restored."""

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memjax.checkpoint.blocks import BLOCK_BYTES
from memjax.checkpoint.errors import Damaged
from memjax.checkpoint.index import Note, note_of
from memjax.checkpoint.processes import any_process
from memjax.checkpoint.restoring import Restored, StoredStep
from memjax.checkpoint.steps import Retention, Steps
from memjax.errors import CheckpointError
from memjax.io.console import warn

if TYPE_CHECKING:
    from memjax.checkpoint.saving import Writer


class Checkpoints(Steps):
    """The checkpoints of one folder.

    Only saving creates or cleans the folder, so any number of readers may look at a run that is being trained. One
    writer at a time. With several processes, each one calls every method, at the same point of the run. A run that
    continues saving restores with the same object, so that a step found damaged is saved again.

    Args:
        folder: Holds one folder per step.
        keep: Latest steps that stay, and as many of the latest complete ones.
        keep_best: Whether the step with the lowest loss stays too.
        verify: Whether everything read is compared with its digest.
        block_bytes: Arrays larger than this are stored as row blocks of at most this size (of one row at least).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_best: bool = True,
        verify: bool = True,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        super().__init__(folder)
        self._verify, self._block_bytes = verify, block_bytes
        self._retention = Retention(self, keep=keep, keep_best=keep_best)
        self._writer: Writer | None = None
        self._damaged: set[int] = set()
        self._replaced: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        documents: Mapping[str, Mapping[str, Any]],
        *,
        loss: float | None = None,
        partial: bool = False,
    ) -> None:
        """Copies the arrays to host memory, then writes them in the background; does nothing if the step exists.

        A complete step takes the place of a partial one.

        The arrays may be donated as soon as this returns. A save that is still being written is waited for first.

        Args:
            step: Number of the step.
            arrays: A tree of `jax.Array` by item name.
            documents: JSON objects by item name.
            loss: What `best` ranks by; a step without one, or with one that is not finite, is never the best.
            partial: Items of other steps are left out: only who asks for this step by its number reads it.

        Raises:
            CheckpointError: this save, or the one before in the background, failed.
        """
        # With Orbax, whose import would delay every command that only reads.
        from memjax.checkpoint.saving import Writer, items_of

        self.wait()
        if any_process(step in self.steps()) and step not in self._damaged | self._replaced:
            if partial or not self.is_partial(step):
                return
            self._replaced.add(step)
        self._writer = writer = self._writer or Writer(self.folder, self._retention)
        with writer.failing(f"step {step}"):
            self._make_way(writer)
            writer.open()
            note = Note(loss if loss is not None and math.isfinite(loss) else None, partial)
            items = items_of(step, arrays, documents, note, self._block_bytes)
            self._remember(step, note)
            writer.write(step, items)

    def restore(
        self,
        targets: Mapping[str, Any],
        documents: Sequence[str] = (),
        *,
        step: int | None = None,
        optional: Collection[str] = (),
    ) -> Restored:
        """Reads the named items and nothing else.

        Without `step`, a newest complete step that is damaged is reported on stderr and the one before it is read; the
        next save moves the damaged one out of the way.

        Args:
            targets: A tree of `jax.ShapeDtypeStruct` by item name. Leaves come back under their sharding, or on the
                first device where it is None; the mesh need not be the one that saved.
            documents: Names of JSON items.
            step: The step to read; None means the newest that can be read.
            optional: Items that do not come back if the step has none of that name.

        Raises:
            CheckpointError: nothing there, nothing readable, or a target does not fit what was saved, or is what a
                partial step lacks.
        """
        candidates = self.complete()[::-1] if step is None else [step]
        if step is not None and step not in self.steps():
            raise CheckpointError(f"{self.folder}: there is no step {step}; there are {self.steps() or 'none'}")
        for candidate in candidates:
            try:
                found = self._read(candidate, targets, documents, optional)
            except Damaged as error:
                self._damaged.add(candidate)
                if step is not None:
                    raise
                warn(f"warning: {error}; trying the step before")
            else:
                if step is None:
                    # Whoever resumes here comes to the partial ones after it once more.
                    self._replaced.update(set(self.steps()) - set(candidates) - set(range(candidate)))
                return found
        if candidates:
            found = f"none of the steps {candidates} can be read"
        elif self.steps():
            found = f"the steps {self.steps()} are all partial, saved without their largest items"
        else:
            found = "there is no checkpoint"
        raise CheckpointError(f"{self.folder}: {found}; name the folder of another run, or start over in a new one")

    def read_rows(self, item: str, name: str, *, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of one leaf in host memory, block by block, each with the number of its first row.

        Nothing is put on a device. The digest is compared when all blocks are read.

        Raises:
            CheckpointError: there is no such leaf, or it is damaged.
        """
        return StoredStep(self.folder, step).read_rows(item, name, verify=self._verify)

    def read_document(self, name: str, step: int | None = None) -> dict[str, Any]:
        """One JSON item of a step, by default of the newest that can be read."""
        return self.restore({}, [name], step=step).documents[name]

    def check(self) -> None:
        """Raises CheckpointError if the last background save failed; never waits for one that is running."""
        if self._writer is not None and not self._writer.is_writing():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises CheckpointError if the last save failed."""
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Waits, then frees what saving needs. Reading, and saving again, stay possible."""
        self.wait()
        if self._writer is not None:
            self._writer.close()

    def _make_way(self, writer: "Writer") -> None:
        if self._replaced:
            writer.delete(self._replaced.intersection(self.steps()))
            self._replaced.clear()
        if damaged := self._damaged.intersection(self.steps()):
            writer.quarantine(damaged)
        self._damaged.clear()

    def _read(
        self, step: int, targets: Mapping[str, Any], documents: Sequence[str], optional: Collection[str]
    ) -> Restored:
        stored = StoredStep(self.folder, step)
        index = stored.index
        targets = {item: tree for item, tree in targets.items() if item in index["arrays"] or item not in optional}
        absent = [item for item in targets if item not in index["arrays"]]
        if absent and note_of(index).partial:
            newest = self.latest()
            way_out = "no step here has all of it" if newest is None else f"the newest step with all of it is {newest}"
            raise CheckpointError(f"{self.folder}: step {step} was saved without its {' and '.join(absent)}; {way_out}")
        return stored.restore(targets, documents, verify=self._verify)
