"""Hooks: extra work that a trainer does around its steps."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memjax.monitoring.metrics import Row
from memjax.training.in_flight import Step

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer

STOP_SECONDS = 5.0
"""How long `Hook.end` may wait for a network in an interrupted run."""


class Hook:
    """Base class of hooks; methods that are not overridden do nothing.

    Every process of a run calls the same methods at the same points, so a hook may run a computation on all devices;
    only the first process should write files (`memjax.sharding.processes.is_first`).
    """

    def state(self) -> dict[str, Any]:
        """State to checkpoint, as JSON values."""
        return {}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restores what `state` returned after the step from which the run resumes.

        Not called if the checkpoint has no hook of this name. Checkpoints older than hooks pass their whole `meta`.
        """

    def begin(self, trainer: "Trainer") -> None:
        """Called once before the first step; the trainer's state is ready."""

    def before_step(self, trainer: "Trainer", number: int) -> None:
        """Called before every step, whatever the hook's period."""

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        """Called after each step for which the hook is due; the device may still be computing it.

        `step.host_metrics` and `step.add` take metrics for its row. Long work belongs under `trainer.paused()`.
        """

    def on_row(self, trainer: "Trainer", row: Row) -> None:
        """Called with the metrics of every step, in order, once they are known. Anything added to the row is logged."""

    def on_late_metrics(self, trainer: "Trainer", step: int, metrics: Row) -> None:
        """Called with metrics of a step whose row has already been written."""

    def end(self, trainer: "Trainer") -> None:
        """Called once, whatever ends the run; hooks end in the reverse of the order in which they began."""


@dataclasses.dataclass(frozen=True)
class Periodic:
    """A hook, its name, and its period."""

    name: str
    hook: Hook
    every: int | None = 1
    """Steps between calls of `after_step`, which is also called after the last step; None for only after the last."""

    def __post_init__(self) -> None:
        """Refuses a period of less than one step."""
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"hook {self.name}: every={self.every} must be 1 or more, or None for only after the last step"
            )

    def is_due(self, step: Step) -> bool:
        """Whether `after_step` is called."""
        in_period = self.every is not None and step.number % self.every == 0
        return in_period or step.is_last or self.name in step.requested
