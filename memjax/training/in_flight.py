"""Steps that the device computes while the host prepares the next ones."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from memjax.monitoring.metrics import Row
from memjax.monitoring.progress import Stopwatch

IN_FLIGHT = 1
"""Steps in flight while the loop waits for the one before: one computes while the next is prepared. More would only
delay signals, the detection of NaN, and progress lines."""


class NotFinite(Exception):
    """A loss or gradient is not finite; the state before that step is saved."""


@dataclasses.dataclass
class Step:
    """A step that was dispatched to the device, and what the host knows about it."""

    number: int
    data_position: dict[str, Any]
    """Position in the data after the step's batch."""
    is_last: bool = False
    """Whether the run ends with it."""
    device_metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Reading these waits for the step."""
    host_metrics: Row = dataclasses.field(default_factory=dict)
    requested: set[str] = dataclasses.field(default_factory=set)
    """Names of hooks to call after this step even if they are not due."""

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to the step's row, which must be scalars on the device, and starts to copy them to the host.

        Numbers on the host go into `host_metrics`.
        """
        for value in metrics.values():
            value.copy_to_host_async()
        self.device_metrics |= metrics


class InFlight:
    """The steps whose metrics have not been read yet, oldest first."""

    def __init__(self, before_each: Callable[[], None] = lambda: None):
        """`before_each` is called before a step is removed; if it raises, the step stays."""
        self._before_each = before_each
        self._steps: deque[Step] = deque()
        self.stopwatch = Stopwatch()
        """A step's time is that between the end of the previous step and its own end, as the host sees them."""

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_done(self) -> bool:
        """Whether the device has computed all steps."""
        return all(value.is_ready() for step in self._steps for value in step.device_metrics.values())

    def push(self, step: Step) -> None:
        self._steps.append(step)

    def finished(self, *, keep: int = IN_FLIGHT) -> Iterator[tuple[Step, Row]]:
        """Removes and yields steps with their rows, waiting for each, until `keep` of them are left.

        Raises:
            NotFinite: a step was not finite; the steps after it are dropped.
        """
        while len(self._steps) > keep:
            step = self._steps[0]
            metrics = jax.device_get(step.device_metrics)
            seconds = self.stopwatch.lap()
            if not metrics.pop("healthy"):
                self._steps.clear()
                raise NotFinite(
                    f"step {step.number}: a value is not finite (loss {metrics['train/loss']:.4g}, gradient norm "
                    f"{metrics['train/grad_norm']:.4g}). Try a lower optim.lr or optim.table.lr, or look at the data."
                )
            self._before_each()
            self._steps.popleft()
            row: Row = {"step": step.number, **{name: value.item() for name, value in metrics.items()}}
            yield step, row | step.host_metrics | {"throughput/step_seconds": seconds}
