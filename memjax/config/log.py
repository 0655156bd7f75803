"""What a run prints and where its metrics go."""

import dataclasses
from typing import Literal

from memjax.config.checks import not_empty, positive, refuse, typed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases (pip install wandb). A resumed run goes on as the same run there."""

    project: str = "memjax"
    """The project."""
    name: str | None = None
    """The run's name; null takes that of its folder."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps everything in the run's folder, for `wandb sync`."""

    def __post_init__(self) -> None:
        typed(self)
        refuse(not_empty(project=self.project, name=self.name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrackioConfig:
    """Trackio (pip install trackio), a local dashboard: `trackio show`."""

    project: str = "memjax"
    """The project."""
    name: str | None = None
    """The run's name; null takes that of its folder."""

    def __post_init__(self) -> None:
        typed(self)
        refuse(not_empty(project=self.project, name=self.name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """A trace of some steps, and a table of the operations that took the most time in them."""

    start: int = 10
    """The first step that is traced; the steps before it warm up."""
    steps: int = 5
    """Steps that are traced."""
    top: int = 15
    """Operations in the table."""

    def __post_init__(self) -> None:
        typed(self)
        refuse(positive(start=self.start, steps=self.steps, top=self.top))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is printed and written while the run goes on. None of these writers can stop it."""

    progress_seconds: float = 5.0
    """Seconds between progress lines."""
    usage_every: int = 100
    """Steps over which reads of the slots are counted for one set of slot statistics."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into the run's folder."""
    wandb: WandbConfig | None = None
    """Send the metrics to Weights & Biases too; '{}' switches it on with its defaults."""
    trackio: TrackioConfig | None = None
    """Keep the metrics in Trackio too; '{}' switches it on with its defaults."""
    profile: ProfileConfig | None = None
    """Trace some steps; '{}' switches it on with its defaults."""

    def __post_init__(self) -> None:
        typed(self)
        refuse(positive(progress_seconds=self.progress_seconds, usage_every=self.usage_every))
