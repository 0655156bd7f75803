"""Mirrors a run's folder to another place, in the background after each save."""

import importlib.util
import pathlib
import threading
import time
from typing import TYPE_CHECKING

from memjax.errors import ConfigError
from memjax.io import remote
from memjax.io.console import warn
from memjax.io.paths import is_remote
from memjax.sharding.processes import is_first
from memjax.training.hook import STOP_SECONDS, Hook

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer

LOOK_SECONDS = 1.0
"""How often the folder is checked for a new save."""

_POLL_SECONDS = 0.1


class Mirror(Hook):
    """Copies a run's folder from the first process, while training continues."""

    _thread: threading.Thread | None = None

    def __init__(self, folder: pathlib.Path, address: str):
        self._folder, self._address = folder, address
        self._newest: int | None = None
        self._look_at = 0.0
        self._has_warned = False

    def before_step(self, trainer: "Trainer", number: int) -> None:
        """Starts to copy a complete save, unless the previous copy is in progress."""
        now = time.monotonic()
        is_busy = self._thread is not None and self._thread.is_alive()
        if number == 1 or not is_first() or is_busy or now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        try:
            newest = max(trainer.checkpoints.steps(), default=None)
            if newest != self._newest:
                self._start()
                self._newest = newest
        except Exception as error:  # the folder cannot be listed at the moment
            if not self._has_warned:
                self._has_warned = True
                _warn(self._address, error)

    def end(self, trainer: "Trainer") -> None:
        """Waits for the current copy, and copies what is new; if the run must stop, waits only a few seconds."""
        self._wait(trainer)
        if is_first() and not _must_stop(trainer):
            self._start()
            self._wait(trainer)

    def _start(self) -> None:
        thread = threading.Thread(target=mirror, args=(self._folder, self._address), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads
            _warn(self._address, error)
        else:
            self._thread = thread

    def _wait(self, trainer: "Trainer") -> None:
        if self._thread is None:
            return
        while self._thread.is_alive() and not _must_stop(trainer):
            self._thread.join(_POLL_SECONDS)
        self._thread.join(STOP_SECONDS)


def _must_stop(trainer: "Trainer") -> bool:
    return trainer.interrupt.name is not None or trainer.must_stop


def mirror(folder: pathlib.Path, address: str) -> None:
    """Brings the copy up to date; if anything goes wrong, only prints a warning."""
    try:
        remote.push(folder, address)
    except Exception as error:  # of any file system
        _warn(address, error)


def check_mirror(folder: pathlib.Path, address: str) -> None:
    """Raises ConfigError, before the first step, unless the address is empty or holds a mirror of the folder's run.

    Neither folder may lie in the other. A store that does not answer only causes a warning: it may answer later, and is
    checked again before anything is sent.
    """
    if importlib.util.find_spec("fsspec") is None:
        raise ConfigError(f"run.mirror={address} needs the package fsspec: pip install 'memjax[remote]'")
    if not is_remote(address):
        here, there = folder.resolve(), pathlib.Path(address).resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise ConfigError(
                f"run.mirror={address} and run.dir={folder} must be separate folders; name another mirror"
            )
    try:
        problem = remote.why_not_mirror(folder, address)
    except ModuleNotFoundError as error:
        raise ConfigError(f"run.mirror={address}: {error}") from None
    except Exception as error:  # of any file system
        _warn(address, error)
        return
    if problem:
        raise ConfigError(f"run.mirror={problem}")


def _warn(address: str, error: Exception) -> None:
    warn(f"run.mirror={address}: the copy is not up to date: {type(error).__name__}: {error}")
