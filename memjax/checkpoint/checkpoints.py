"""The checkpoints of a run: saving, retention, lookup and restoring."""

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

    Only saving creates or cleans the folder, so any number of readers may open a run that is being trained; only one
    writer is allowed. With several processes, each one calls every method at the same point of the run. A run that
    saves later must restore with the same object, so that a step found damaged is saved again.

    Args:
        folder: Contains one folder per step.
        keep: How many of the latest steps to keep, and how many of the latest complete ones.
        keep_best: Whether to keep the step with the lowest loss, too.
        verify: Whether to compare everything that is read with its digest.
        block_bytes: Arrays larger than this are stored as row blocks of at most this size (but at least one row).
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

        A complete step replaces a partial one. Waits first for a previous save that is still being written. The arrays
        may be donated as soon as this returns.

        Args:
            step: Number of the step.
            arrays: A tree of `jax.Array` by item name.
            documents: JSON objects by item name.
            loss: Used by `best`; a step without a finite loss is never the best.
            partial: Whether large items were left out; such a step is restored only if requested by number.

        Raises:
            CheckpointError: this save, or the previous one in the background, failed.
        """
        # Imports Orbax, which would delay every command that only reads.
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
        """Reads only the named items.

        Without `step`, a damaged step is reported on stderr and the complete step before it is tried; the next save
        moves damaged ones out of the way.

        Args:
            targets: A tree of `jax.ShapeDtypeStruct` by item name. Leaves are returned with their sharding, or on the
                first device if it is None; the mesh may differ from the one that saved.
            documents: Names of JSON items.
            step: The step to read; None: the newest complete one that is readable.
            optional: Items that are skipped if the step lacks them.

        Raises:
            CheckpointError: there is no readable step, a target does not match what was saved, or a partial step lacks
                it.
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
                    # A run resumed from here will save the later partial steps again.
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
        """Yields the rows of one leaf in host memory, block by block, each with the index of its first row.

        Nothing is put on a device. The digest is compared after the last block.

        Raises:
            CheckpointError: there is no such leaf, or it is damaged.
        """
        return StoredStep(self.folder, step).read_rows(item, name, verify=self._verify)

    def read_document(self, name: str, step: int | None = None) -> dict[str, Any]:
        """One JSON item of a step, by default of the newest complete one that is readable."""
        return self.restore({}, [name], step=step).documents[name]

    def check(self) -> None:
        """Raises CheckpointError if the last background save failed; never waits for one that is running."""
        if self._writer is not None and not self._writer.is_writing():
            self.wait()

    def wait(self) -> None:
        """Waits for the background save to finish; raises CheckpointError if it failed."""
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Waits, then frees the resources of saving. Reading and saving remain possible."""
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
