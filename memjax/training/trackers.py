"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio. None of them can stop or slow a run.

Each has a thread of its own that imports, starts, feeds and ends it; the loop only puts rows of plain numbers into a
queue. Whatever is raised there is printed once, and the run goes on without that tracker.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import pathlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol

from memjax.config import RunConfig, TrackioConfig, WandbConfig
from memjax.io.console import warn
from memjax.io.files import write_atomic
from memjax.training.metrics import Row

_MOST_WAITING = 100_000
"""Rows that may wait for a tracker; one that falls further behind will not catch up."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for a tracker. Whoever sends SIGTERM waits about 30 seconds before SIGKILL."""
_FLUSH_SECONDS = 15


class Sink(Protocol):
    """What a tracker's thread writes to. Any method may raise."""

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the numbers of a step."""
        ...

    def close(self) -> None:
        """Hands over what is left."""
        ...


class Tracker:
    """A sink behind a thread."""

    def __init__(self, name: str, start: Callable[[], Sink]):
        """Starts the thread.

        Args:
            name: the setting that asks for the tracker.
            start: makes the sink; runs in the thread.
        """
        self.name = name
        self._rows: queue.Queue[Row | None] = queue.Queue(_MOST_WAITING)
        self._dropped = False
        # A daemon, because a service that never answers must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=[start], name=f"memjax {name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Takes a step's row; returns at once and raises nothing."""
        if self._dropped:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._drop(f"it is {_MOST_WAITING} steps behind")

    def finish(self) -> None:
        """Says that no row will follow; returns at once and raises nothing."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)

    def wait(self, seconds: float) -> None:
        """Waits until everything is handed over, but no longer than that; raises nothing."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._drop("it does not finish, so its last steps may be missing")

    def _run(self, start: Callable[[], Sink]) -> None:
        # Libraries that give up sometimes raise SystemExit, which is no Exception.
        try:
            sink = start()
            while not self._dropped and (row := self._rows.get()) is not None:
                metrics = {name: value for name, value in row.items() if name != "step" and value is not None}
                sink.write(row["step"], metrics)
            sink.close()
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split()).rstrip(".")
            self._drop(text if isinstance(error, _Unusable) else f"{type(error).__name__}: {text}")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            warn(f"{self.name}: {why}. The run goes on without it.")


def make_trackers(config: RunConfig, folder: pathlib.Path, *, last_step: int) -> list[Tracker]:
    """The trackers that a config asks for.

    Args:
        config: the run's.
        folder: the run's; TensorBoard's and W&B's files and what a resumption needs to know lie in it.
        last_step: the step that the run goes on from. What was written after it is hidden (TensorBoard), or its steps
            are not sent again (the others).
    """
    log, trackers = config.log, []
    if log.tensorboard:
        trackers.append(Tracker("log.tensorboard", lambda: _TensorBoard(folder / "tensorboard", last_step)))
    if wandb := log.wandb:
        trackers.append(Tracker("log.wandb", lambda: _Wandb(config, wandb, folder)))
    if trackio := log.trackio:
        trackers.append(Tracker("log.trackio", lambda: _Trackio(config, trackio, folder)))
    return trackers


def close_trackers(trackers: Iterable[Tracker], seconds: float = CLOSE_SECONDS) -> None:
    """Hands over what the trackers still have, all at the same time, and waits for it, but not for ever."""
    trackers = list(trackers)
    end = time.monotonic() + seconds
    for tracker in trackers:
        tracker.finish()
    for tracker in trackers:
        tracker.wait(end - time.monotonic())


class _Unusable(Exception):
    """The tracker cannot start; the message says what to do."""


class _NotInstalled(_Unusable):
    """A package is missing."""


def _package(name: str, install: str) -> ModuleType:
    """An optional package.

    Raises:
        _NotInstalled: it is missing; the message says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise _NotInstalled(f"{name} is not installed; get it with: pip install '{install}'") from None


class _TensorBoard:
    """Event files. Those of an earlier start stay; TensorBoard hides their steps that this start makes again."""

    def __init__(self, folder: pathlib.Path, last_step: int):
        library = _package("tensorboardX", "tensorboardX")
        # Files are named by the second they were made in; the suffix keeps two starts within one second apart.
        self._writer = library.SummaryWriter(
            str(folder), purge_step=last_step + 1, flush_secs=_FLUSH_SECONDS, filename_suffix=f".{uuid.uuid4().hex[:8]}"
        )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """What W&B and Trackio have in common: a run with `log` and `finish`, which does not take a step back.

    The last step handed over is kept in the run's folder, so that steps made again after a resumption are not sent
    twice.
    """

    def __init__(self, notes: pathlib.Path):
        self._path = notes
        self.notes: dict[str, Any] = _read_notes(notes)
        self.run: Any = None

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        if step <= self.notes.get("step", 0):
            return
        self.run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)
        self.keep(step=step)

    def close(self) -> None:
        self.run.finish()

    def keep(self, **notes: Any) -> None:
        """Adds notes to those in the folder."""
        self.notes |= notes
        write_atomic(self._path, json.dumps(self.notes) + "\n")


def _read_notes(path: pathlib.Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        notes = None
    if not isinstance(notes, dict):
        raise _Unusable(f"{path} is damaged; remove it, and the next start begins a new run there")
    return notes


class _Wandb(_Service):
    def __init__(self, config: RunConfig, settings: WandbConfig, folder: pathlib.Path):
        library = _package("wandb", "wandb")
        super().__init__(folder / "wandb.json")
        if "id" not in self.notes:
            self.keep(id=uuid.uuid4().hex[:12])
        self.run = library.init(
            project=settings.project,
            name=settings.name or folder.resolve().name,
            id=self.notes["id"],
            resume="allow",
            mode=settings.mode,
            dir=str(folder),
            config=dataclasses.asdict(config),
            # It would take the whole process's output in hand otherwise.
            settings={"console": "off"},
        )


class _Trackio(_Service):
    def __init__(self, config: RunConfig, settings: TrackioConfig, folder: pathlib.Path):
        library = _package("trackio", "trackio")
        super().__init__(folder / "trackio.json")
        self.run = library.init(
            project=settings.project,
            name=settings.name or folder.resolve().name,
            # Runs are found again by name alone: only a folder that has begun one may go on with it.
            resume="allow" if self.notes else "never",
            config=dataclasses.asdict(config),
            embed=False,
        )
