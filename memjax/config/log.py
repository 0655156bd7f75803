"""Settings of logging: progress lines, trackers and profiles."""

import dataclasses
from typing import Literal

from memjax.config.section import NotEmpty, Positive, Section


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig(Section):
    """Weights & Biases (pip install wandb). A resumed run continues as the same run there."""

    project: NotEmpty[str] = "memjax"
    """The project."""
    name: NotEmpty[str] | None = None
    """Name of the run; null: that of its folder."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps everything in the run's folder, for `wandb sync`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrackioConfig(Section):
    """Trackio (pip install trackio), a local dashboard: `trackio show`."""

    project: NotEmpty[str] = "memjax"
    """The project."""
    name: NotEmpty[str] | None = None
    """Name of the run; null: that of its folder."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig(Section):
    """A trace of some steps, and a table of the operations that took the most time."""

    start: Positive[int] = 10
    """First traced step; the steps before it warm up."""
    steps: Positive[int] = 5
    """Number of traced steps."""
    top: Positive[int] = 15
    """Number of operations in the table."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig(Section):
    """What a run prints and logs. A failing writer does not stop the run."""

    progress_seconds: Positive[float] = 5.0
    """Seconds between progress lines."""
    usage_every: Positive[int] = 100
    """Number of steps over which slot reads are counted for each report of slot statistics."""
    tensorboard: bool = True
    """Also write the metrics for TensorBoard, in the run's folder."""
    wandb: WandbConfig | None = None
    """Also send the metrics to Weights & Biases; '{}' enables it with its defaults."""
    trackio: TrackioConfig | None = None
    """Also send the metrics to Trackio; '{}' enables it with its defaults."""
    profile: ProfileConfig | None = None
    """Trace some steps; '{}' enables it with its defaults."""
