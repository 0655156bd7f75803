"""Trackers (TensorBoard, Weights & Biases, Trackio), each behind a thread, so that none can stop or slow down a run.

A tracker's thread imports, starts, feeds and ends it; the loop only puts rows of plain numbers into a queue. Any error
in the thread is printed once, and the run continues without that tracker.
"""

import contextlib
import importlib
import math
import queue
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from memjax.io.console import warn
from memjax.monitoring.metrics import Row

_MOST_WAITING = 100_000
"""Rows that may wait for a tracker; one that falls further behind will not catch up."""


class Sink(Protocol):
    """Where a tracker's thread writes. Any method may raise."""

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the metrics of a step."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class Tracker:
    """A sink behind a thread."""

    def __init__(self, name: str, start: Callable[[], Sink]):
        """Starts the thread, in which `start` creates the sink. `name` is the setting that asks for the tracker."""
        self.name = name
        self._rows: queue.Queue[Row | None] = queue.Queue(_MOST_WAITING)
        self._dropped = False
        # A daemon, because a service that never answers must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=[start], name=f"memjax {name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queues the row of a step; returns at once and never raises."""
        if self._dropped:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._drop(f"it is {_MOST_WAITING} steps behind")

    def finish(self) -> None:
        """Marks the end of the rows; returns at once and never raises."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)

    def wait(self, seconds: float) -> None:
        """Waits until everything has been written, but at most `seconds`; never raises."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._drop("it does not finish, so its last steps may be missing")

    def _run(self, start: Callable[[], Sink]) -> None:
        # Libraries that give up may raise SystemExit, which is not an Exception.
        try:
            sink = start()
            while not self._dropped and (row := self._rows.get()) is not None:
                # A mixture's part has no loss in a step without tokens of it.
                is_shown = lambda name, value: name != "step" and value is not None and math.isfinite(value)
                metrics = {name: value for name, value in row.items() if is_shown(name, value)}
                sink.write(row["step"], metrics)
            sink.close()
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split()).rstrip(".")
            self._drop(text if isinstance(error, Unusable) else f"{type(error).__name__}: {text}")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            warn(f"{self.name}: {why}. The run continues without it.")


class Unusable(Exception):
    """The tracker cannot start; the message says what to do."""


class NotInstalled(Unusable):
    """A package is missing."""


def optional_package(name: str, install: str) -> ModuleType:
    """Imports an optional package; NotInstalled, with what to install, if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise NotInstalled(f"{name} is not installed; get it with: pip install '{install}'") from None
