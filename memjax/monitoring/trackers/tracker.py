"""Trackers (TensorBoard, Weights & Biases, Trackio) behind a thread each, so that none can stop or slow a run.

Each has a thread of its own that imports, starts, feeds and ends it; the loop only puts rows of plain numbers into a
queue. Whatever is raised there is printed once, and the run continues without that tracker.
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
    """Destination of a tracker's thread. Any method may raise."""

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the numbers of a step."""
        ...

    def close(self) -> None:
        """Hands over what is left."""
        ...


class Tracker:
    """A sink behind a thread."""

    def __init__(self, name: str, start: Callable[[], Sink]):
        """Starts the thread, in which `start` makes the sink. `name` is the setting that asks for the tracker."""
        self.name = name
        self._rows: queue.Queue[Row | None] = queue.Queue(_MOST_WAITING)
        self._dropped = False
        # A daemon, because a service that never answers must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=[start], name=f"memjax {name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queues the row of a step; returns at once and raises nothing."""
        if self._dropped:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._drop(f"it is {_MOST_WAITING} steps behind")

    def finish(self) -> None:
        """Marks the end of the rows; returns at once and raises nothing."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)

    def wait(self, seconds: float) -> None:
        """Waits until everything is handed over, but no longer than that; raises nothing."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._drop("it does not finish, so its last steps may be missing")

    def _run(self, start: Callable[[], Sink]) -> None:
        # Libraries that give up may raise SystemExit, which is not an Exception.
        try:
            sink = start()
            while not self._dropped and (row := self._rows.get()) is not None:
                # A part of a mixture has no loss in a step without its tokens.
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
    """An optional package.

    Raises:
        NotInstalled: it is missing; the message says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise NotInstalled(f"{name} is not installed; get it with: pip install '{install}'") from None
