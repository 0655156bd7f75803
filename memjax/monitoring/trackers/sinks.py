"""Destinations of trackers: TensorBoard's event files, Weights & Biases, Trackio."""

import contextlib
import dataclasses
import json
import pathlib
import socket
import time
import uuid
from typing import Any

from memjax.config.log import TrackioConfig, WandbConfig
from memjax.config.run import RunConfig
from memjax.io.files import read_document, write_atomic
from memjax.monitoring.trackers.tracker import Unusable, optional_package

_FLUSH_SECONDS = 15


class TensorBoard:
    """An event file. Those of earlier starts are kept; TensorBoard hides their steps that this start repeats.

    It is written in this thread, because the library's `SummaryWriter` has a thread that dies with a traceback when the
    disk is full, and closing then waits for it.
    """

    def __init__(self, folder: pathlib.Path, last_step: int):
        optional_package("tensorboardX", "tensorboardX")
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        self._scalar = scalar
        folder.mkdir(parents=True, exist_ok=True)
        # Two starts within one second, and machines that share a folder, have separate files.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        self._file, self._due = RecordWriter(str(folder / name)), 0.0
        self._add(0, file_version="brain.Event:2")
        self._add(last_step + 1, session_log={"status": "START"})

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step."""
        try:
            for name, value in metrics.items():
                self._add(step, summary=self._scalar(name, value))
            if time.monotonic() >= self._due:
                self._file.flush()
                self._due = time.monotonic() + _FLUSH_SECONDS
        except OSError:
            # Otherwise the buffer would be written, and fail, once more when the object is deleted.
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def close(self) -> None:
        """Writes the buffer and closes the file."""
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())


class Service:
    """Base class of W&B and Trackio: a run with `log` and `finish`, whose steps may only increase.

    The last step sent is kept in the run's folder, so that steps repeated after resuming are not sent twice.
    """

    def __init__(self, notes: pathlib.Path):
        self._path = notes
        self.notes: dict[str, Any] = _read_notes(notes)
        self.run: Any = None

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs the metrics of a step, unless an earlier start did so."""
        if step <= self.notes.get("step", 0):
            return
        self.run.log(metrics, step=step)
        self.keep(step=step)

    def close(self) -> None:
        self.run.finish()

    def keep(self, **notes: Any) -> None:
        """Adds notes to those in the folder."""
        self.notes |= notes
        write_atomic(self._path, json.dumps(self.notes) + "\n")


def _read_notes(path: pathlib.Path) -> dict[str, Any]:
    try:
        notes = json.loads(read_document(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise Unusable(f"{path} is damaged; remove it, and the next start begins a new run there")
    return notes


class Wandb(Service):
    """A run in Weights & Biases."""

    def __init__(self, config: RunConfig, settings: WandbConfig, folder: pathlib.Path):
        library = optional_package("wandb", "wandb")
        super().__init__(folder / "wandb.json")
        if "step" not in self.notes:  # any id is of a start that sent nothing, and may have had other settings
            self.keep(id=uuid.uuid4().hex[:12])
        self.run = library.init(
            project=settings.project,
            name=settings.name or folder.resolve().name,
            id=self.notes["id"],
            resume="allow",
            mode=settings.mode,
            dir=str(folder),
            config=dataclasses.asdict(config),
            # Otherwise it would capture the output of the whole process.
            settings={"console": "off"},
        )


class Trackio(Service):
    """A run in Trackio."""

    def __init__(self, config: RunConfig, settings: TrackioConfig, folder: pathlib.Path):
        library = optional_package("trackio", "trackio")
        super().__init__(folder / "trackio.json")
        self.run = library.init(
            project=settings.project,
            name=settings.name or folder.resolve().name,
            # Runs are identified only by name, so only the folder that began one may resume it.
            resume="allow" if self.notes else "never",
            config=dataclasses.asdict(config),
            embed=False,
        )
