"""Saving: steps are written in the background by Orbax and committed by a rename; old ones are removed."""

import contextlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from memjax.checkpoint.blocks import split_blocks
from memjax.checkpoint.digests import text_digest
from memjax.checkpoint.errors import explained, write_advice
from memjax.checkpoint.index import INDEX, Note, describe, seal
from memjax.checkpoint.names import flatten, nest
from memjax.checkpoint.processes import any_process
from memjax.checkpoint.steps import Retention
from memjax.errors import CheckpointError
from memjax.io.paths import literal

_TRASH = ".trash"
_QUARANTINE = ".unreadable"
_SAVE_SECONDS = 24 * 3600
"""A save that takes longer than this fails."""


def items_of(
    step: int, arrays: Mapping[str, Any], documents: Mapping[str, Mapping[str, Any]], note: Note, block_bytes: int
) -> dict[str, Any]:
    """Orbax's arguments for all items of a step: the arrays in blocks, the documents, and the index of both."""
    leaves = {item: flatten(tree) for item, tree in arrays.items()}
    records = {item: describe(flat, block_bytes) for item, flat in leaves.items()}
    # Through JSON and back, because that changes keys and tuples, and the digest must be of what will be read.
    texts = {item: json.loads(json.dumps(document)) for item, document in documents.items()}
    digests = {item: text_digest(text) for item, text in texts.items()}
    index = {"step": step, "arrays": records, "documents": digests, **note._asdict()}
    items: dict[str, Any] = {item: ocp.args.JsonSave(text) for item, text in texts.items()}
    items[INDEX] = ocp.args.JsonSave(seal(index))
    for item, flat in leaves.items():
        if stored := nest(split_blocks(flat, records[item])):  # Orbax refuses empty items; the index has them
            items[item] = ocp.args.PyTreeSave(stored)
    return items


class _ReportedOnce(logging.Filter):
    """Drops errors logged by Orbax: failures in its threads are raised by the next wait, and failures to read metadata
    that is not written yet are harmless.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or not (record.exc_info or record.levelno >= logging.ERROR)


_REPORTED_ONCE = _ReportedOnce()


class Writer:
    """Writes and deletes steps in one folder; with several processes, each one calls every method."""

    def __init__(self, folder: pathlib.Path, retention: Retention) -> None:
        self._folder, self._retention = folder, retention
        self._manager: ocp.CheckpointManager | None = None
        self._opened = contextlib.ExitStack()

    def open(self) -> ocp.CheckpointManager:
        """Prepares the folder, once, and removes what a killed run left unfinished."""
        if self._manager is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            self._empty_trash()
            logging.getLogger("absl").addFilter(_REPORTED_ONCE)  # Orbax's; adding it again changes nothing
            self._manager = ocp.CheckpointManager(
                self._opened.enter_context(literal(self._folder)),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._retention,
                    cleanup_tmp_directories=True,
                    # A step to delete is first moved away whole, so that a kill cannot leave half a step in the list.
                    todelete_subdir=_TRASH,
                    # The losses are in the index; reading each step's metadata could only fail.
                    lightweight_initialize=True,
                    # Otherwise, if a folder cannot be created, background threads wait for it for minutes.
                    # A save may take longer than Orbax's 20 minutes, and the clock may be adjusted or stop in sleep.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=_SAVE_SECONDS),
                ),
            )
        return self._manager

    def write(self, step: int, items: Mapping[str, Any]) -> None:
        """Copies the arrays to host memory and returns; they are written in the background."""
        self.open().save(step, args=ocp.args.Composite(**items), force=True)

    def is_writing(self) -> bool:
        """Whether a background save is in progress."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits for the background save to finish; raises CheckpointError if it failed."""
        if self._manager is not None:
            with self.failing("the last save"):
                self._manager.wait_until_finished()
            self._empty_trash()

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes steps that are about to be written again."""
        self.close()
        if jax.process_index() == 0:
            for step in steps:
                shutil.rmtree(self._folder / str(step))
        any_process(False)  # a barrier: no process lists the steps before they are gone

    def quarantine(self, steps: Iterable[int]) -> None:
        """Moves steps out of the way without deleting them: what made them unreadable may be temporary."""
        self.close()
        self._refuse_links()
        if jax.process_index() == 0:
            (self._folder / _QUARANTINE).mkdir(exist_ok=True)
            for step in steps:
                target = self._folder / _QUARANTINE / str(step)
                shutil.rmtree(target, ignore_errors=True)
                (self._folder / str(step)).rename(target)

    def close(self) -> None:
        """Frees the resources of writing; the next write reopens the folder."""
        manager, self._manager = self._manager, None
        with self._opened:
            if manager is not None:
                manager.close()

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Explains errors of the body with `what`, and removes unfinished steps; the next write reopens the folder."""
        with explained(CheckpointError, f"{self._folder}: {what} cannot be written", advice=write_advice):
            try:
                yield
            except Exception:
                # After a failure, Orbax's record of the steps may differ from what is on disk.
                with contextlib.suppress(Exception):
                    self.close()
                self._remove_unfinished()
                raise

    def _refuse_links(self) -> None:
        """Raises if a folder into which steps are moved is a link: they would be deleted at its target."""
        for name in (_TRASH, _QUARANTINE):
            if (self._folder / name).is_symlink():
                raise CheckpointError(f"{self._folder / name} is a link, which is not followed; remove it")

    def _remove_unfinished(self) -> None:
        """Removes incomplete steps, which would otherwise keep a full disk full."""
        if jax.process_index() == 0:
            for path in self._folder.glob(f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _empty_trash(self) -> None:
        if jax.process_index() == 0:  # Orbax moves steps there only while it finishes a save
            shutil.rmtree(self._folder / _TRASH, ignore_errors=True)
