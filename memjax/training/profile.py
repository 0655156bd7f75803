"""The hook that traces a window of steps of a run."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
from jax.profiler import ProfileData, ProfileOptions

from memjax.config.log import ProfileConfig
from memjax.io.console import say, warn
from memjax.monitoring.profile import describe_overlap, newest_trace, operations, overlaps, table
from memjax.sharding.processes import is_first
from memjax.training.hook import Hook
from memjax.training.in_flight import Step

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer


class Profile(Hook):
    """Traces a window of steps in the first process and prints what took most time; all processes pause at its ends.

    A failing trace neither stops the run nor moves the window.
    """

    def __init__(self, config: ProfileConfig, folder: pathlib.Path):
        self._window, self._top, self._folder = range(config.start, config.start + config.steps), config.top, folder
        self._first: int | None = None
        """The first traced step while the window is open; in a resumed run, it may be later than the window's start."""
        self._is_tracing = False

    def before_step(self, trainer: "Trainer", number: int) -> None:
        if self._first is not None or number not in self._window:
            return
        self._first = number
        # Steps in flight would be traced too.
        with trainer.paused(), _told():
            if is_first():
                options = ProfileOptions()
                options.python_tracer_level = 0  # tracing every Python call is slow
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
                self._is_tracing = True

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        if self._first is None or not (step.is_last or step.number >= self._window[-1]):
            return
        first, self._first = self._first, None
        with trainer.paused(), _told():
            if self._stop():
                path = newest_trace(self._folder)
                profile = ProfileData.from_file(str(path))
                lines = [f"profile of the steps {first} to {step.number}", table(operations(profile), self._top)]
                lines += [describe_overlap(device, overlap) for device, overlap in overlaps(profile).items()]
                say("\n".join([*lines, f"trace in {path}"]))

    def end(self, trainer: "Trainer") -> None:
        with _told():
            self._stop()

    def _stop(self) -> bool:
        """Ends the trace, if there is one; returns whether there was."""
        was_tracing, self._is_tracing = self._is_tracing, False
        if was_tracing:
            jax.profiler.stop_trace()
        return was_tracing


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Prints errors instead of raising them."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        warn(f"log.profile: {type(error).__name__}: {text}. The run continues without it.")
