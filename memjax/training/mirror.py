"""A copy of a run's folder elsewhere, brought up to date in the background after each save."""

import pathlib
import threading
from typing import TYPE_CHECKING

from memjax.io import remote
from memjax.io.console import warn
from memjax.sharding.processes import is_first
from memjax.training.hook import Hook

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer


class Mirror(Hook):
    """Sends a run's folder from the first process, while the training goes on."""

    _thread: threading.Thread | None = None

    def __init__(self, folder: pathlib.Path, address: str):
        """Has sent nothing yet."""
        self._folder, self._address = folder, address
        self._newest: int | None = None

    def before_step(self, trainer: "Trainer", number: int) -> None:
        """Begins to send a save that is complete, unless the one before is under way."""
        newest = max(trainer.checkpoints.steps(), default=None) if number > 1 and is_first() else None
        if newest == self._newest or (self._thread and self._thread.is_alive()):
            return
        self._newest = newest
        self._thread = threading.Thread(target=mirror, args=(self._folder, self._address), daemon=True)
        self._thread.start()

    def end(self, trainer: "Trainer") -> None:
        """Waits for what is under way, and sends what is new."""
        if self._thread:
            self._thread.join()
        if is_first():
            mirror(self._folder, self._address)


def mirror(folder: pathlib.Path, address: str) -> None:
    """Brings the copy up to date; whatever goes wrong costs a line and nothing else."""
    try:
        remote.push(folder, address)
    except Exception as error:  # of any file system
        warn(f"run.mirror={address}: the copy is not up to date: {type(error).__name__}: {error}")
