"""Destinations of trackers: TensorBoard's event files, Weights & Biases, Trackio."""

import dataclasses
import json
import pathlib
import uuid
from typing import Any

from memjax.config.log import TrackioConfig, WandbConfig
from memjax.config.run import RunConfig
from memjax.io.files import read_document, write_atomic
from memjax.monitoring.trackers.tracker import Unusable, optional_package

_FLUSH_SECONDS = 15


class TensorBoard:
    """Event files. Those of an earlier start stay; TensorBoard hides their steps that this start makes again."""

    def __init__(self, folder: pathlib.Path, last_step: int):
        library = optional_package("tensorboardX", "tensorboardX")
        # Files are named by the second they were made in; the suffix keeps two starts within one second apart.
        self._writer = library.SummaryWriter(
            str(folder), purge_step=last_step + 1, flush_secs=_FLUSH_SECONDS, filename_suffix=f".{uuid.uuid4().hex[:8]}"
        )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the numbers of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Service:
    """Base of W&B and Trackio: a run with `log` and `finish`, whose steps may only increase.

    The last step handed over is kept in the run's folder, so that steps made again after a resumption are not sent
    twice.
    """

    def __init__(self, notes: pathlib.Path):
        self._path = notes
        self.notes: dict[str, Any] = _read_notes(notes)
        self.run: Any = None

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs the numbers of a step, unless an earlier start has."""
        if step <= self.notes.get("step", 0):
            return
        self.run.log(metrics, step=step)
        self.keep(step=step)

    def close(self) -> None:
        """Ends the run there."""
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
        if "step" not in self.notes:  # of a start that sent nothing, and may have had other settings
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


class Trackio(Service):
    """A run in Trackio."""

    def __init__(self, config: RunConfig, settings: TrackioConfig, folder: pathlib.Path):
        library = optional_package("trackio", "trackio")
        super().__init__(folder / "trackio.json")
        self.run = library.init(
            project=settings.project,
            name=settings.name or folder.resolve().name,
            # Runs are found again by name alone: only a folder that has begun one may go on with it.
            resume="allow" if self.notes else "never",
            config=dataclasses.asdict(config),
            embed=False,
        )
