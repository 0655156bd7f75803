"""The standard hooks of a run and their order; throughput, log, slot usage and checkpoints are defined here."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from memjax.monitoring.metrics import WINDOW, MetricsFile, Row, peak_flops, read_metrics
from memjax.monitoring.progress import ProgressLines
from memjax.monitoring.trackers.start import CLOSE_SECONDS, close_trackers, make_trackers
from memjax.monitoring.trackers.tracker import Tracker
from memjax.runs.folder import RunFolder
from memjax.sharding.processes import is_first
from memjax.training.evaluation_hooks import Facts, Questions, Validate
from memjax.training.hook import STOP_SECONDS, Hook, Periodic
from memjax.training.in_flight import Step
from memjax.training.mirror import Mirror
from memjax.training.profile import Profile
from memjax.training.program import TrainProgram
from memjax.training.step import make_usage_report

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer


def with_standard_hooks(
    added: Iterable[Periodic], program: TrainProgram, folder: RunFolder, mesh: jax.sharding.Mesh
) -> list[Periodic]:
    """The hooks that a config asks for and the added ones, in the order in which they are called.

    The added hooks come before those that write a step's row and state, so that logs and checkpoints include theirs.

    Raises:
        ValueError: two hooks have the same name.
    """
    config = program.config
    hooks = [Periodic("throughput", Throughput(program, mesh))]
    if config.log.profile:
        hooks.append(Periodic("profile", Profile(config.log.profile, folder.profile)))
    if config.model.lookups:
        hooks.append(Periodic("slot_usage", SlotUsage(config.log.usage_every), config.log.usage_every))
    if config.eval.recall_every:
        hooks.append(Periodic("facts", Facts(config), config.eval.recall_every))
    if config.eval.questions or config.eval.tasks:
        hooks.append(Periodic("questions", Questions(config), config.eval.questions_every))
    hooks += [
        *added,
        Periodic("log", Log()),
        Periodic("validate", Validate(config), config.eval.every),
        Periodic("save", Save(config.checkpoint.steps_between_tables), config.checkpoint.every),
    ]
    if config.run.mirror:
        hooks.insert(0, Periodic("mirror", Mirror(folder.path, config.run.mirror), None))  # begins first, ends last
    names = [periodic.name for periodic in hooks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two hooks are named {', '.join(twice)}: the names of hooks must be unique")
    return hooks


class Throughput(Hook):
    """Adds tokens so far, speed, model FLOPs utilisation and device memory to every row."""

    def __init__(self, program: TrainProgram, mesh: jax.sharding.Mesh):
        self._flops_per_token = program.flops_per_token
        self._device = mesh.local_devices[0]
        peak = peak_flops(mesh.devices.flat[0])
        self._peak_flops = peak and peak * mesh.size
        self._tokens_seen: int | None = 0
        """Tokens of all steps so far, without padding; None if the checkpoint lacks the count."""
        self._compile_seconds_are_new = True

    def state(self) -> dict[str, Any]:
        return {"tokens_seen": self._tokens_seen}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        self._tokens_seen = saved.get("tokens_seen")

    def begin(self, trainer: "Trainer") -> None:
        """Counts the tokens of the logged rows if the checkpoint lacks the count."""
        if self._tokens_seen is None:
            metrics = read_metrics(trainer.folder.metrics)
            self._tokens_seen = int(np.nansum(metrics.values("train/tokens")[metrics.steps <= trainer.first_step]))

    def on_row(self, trainer: "Trainer", row: Row) -> None:
        tokens = row["train/tokens"]
        self._tokens_seen = (self._tokens_seen or 0) + tokens
        row["train/tokens_seen"] = self._tokens_seen
        row["throughput/tokens_per_second"] = speed = tokens / max(row["throughput/step_seconds"], 1e-9)
        if self._peak_flops:
            row["throughput/mfu"] = speed * self._flops_per_token / self._peak_flops
        sizes = self._device.memory_stats() or {}  # a CPU has none
        row |= {f"device/{name}": sizes[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in sizes}
        if self._compile_seconds_are_new:
            self._compile_seconds_are_new = False
            row["throughput/compile_seconds"] = trainer.compile_seconds


class Log(Hook):
    """Writes rows to `metrics.jsonl` and the trackers, and prints progress; only the first process writes files."""

    _metrics: MetricsFile | None = None
    _trackers: tuple[Tracker, ...] | list[Tracker] = ()

    def begin(self, trainer: "Trainer") -> None:
        """Opens the files, and drops what was written after the step from which the run resumes."""
        config, first_step = trainer.config, trainer.first_step
        if is_first():
            self._metrics = MetricsFile(trainer.folder.metrics, last_step=first_step)
            self._trackers = make_trackers(config, trainer.folder.path, last_step=first_step)
        self._progress = ProgressLines(
            first_step=first_step, steps=config.train.steps, every_seconds=config.log.progress_seconds
        )

    def on_row(self, trainer: "Trainer", row: Row) -> None:
        if self._metrics:
            self._metrics.write(row)
            self._metrics.flush()
        for tracker in self._trackers:
            tracker.write(row)
        self._progress.show(row)

    def on_late_metrics(self, trainer: "Trainer", step: int, metrics: Row) -> None:
        if self._metrics:
            self._metrics.amend(step, metrics)
        for tracker in self._trackers:
            tracker.write({"step": step} | metrics)

    def end(self, trainer: "Trainer") -> None:
        self._progress.close()
        if self._metrics:
            self._metrics.close()
        close_trackers(self._trackers, STOP_SECONDS if trainer.interrupt.name else CLOSE_SECONDS)


class SlotUsage(Hook):
    """Adds slot statistics to the row of the step that ends a window, and restarts the count.

    Only windows of the same length are comparable, so one cut short by a change of `log.usage_every` is dropped. A run
    shorter than one window reports what it has at its end, and continues counting if it is extended.
    """

    def __init__(self, every: int):
        self._every = every
        self._since = 0
        """The step after which counting started."""
        self._report: Any = None
        """Compiled on the first call."""

    def state(self) -> dict[str, Any]:
        return {"usage_since": self._since}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restores the start of the count; versions before 0.2 restarted the count after the last step of a run."""
        config = saved.get("config", {})
        every = config.get("log", {}).get("usage_every") or self._every
        is_end = step == config.get("train", {}).get("steps")
        self._since = saved.get("usage_since", step if is_end else step - step % every)

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        window = step.number - self._since
        is_short = step.is_last and step.number < self._every
        if not is_short and step.number % self._every:
            return
        reads = jax.tree.map(jax.numpy.copy, trainer.state.reads) if is_short else None
        trainer.state, usage = self._measure(trainer)
        if reads is not None:
            trainer.state = dataclasses.replace(trainer.state, reads=reads)
        else:
            self._since = step.number
        if is_short or window == self._every:
            step.add(usage)
            step.host_metrics[WINDOW] = window

    def _measure(self, trainer: "Trainer") -> Any:
        """The state with its counters set to zero, and the statistics."""
        if self._report is not None:
            return self._report(trainer.state)
        self._report = make_usage_report(trainer.program, trainer.mesh)
        with trainer.paused():  # compiles
            return self._report(trainer.state)


class Save(Hook):
    """Saves checkpoints; there may be partial ones without tables between those with tables."""

    def __init__(self, steps_between_tables: int):
        self._steps_between_tables = steps_between_tables

    def before_step(self, trainer: "Trainer", number: int) -> None:
        trainer.check_saves()

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        trainer.finish_steps()
        is_partial = bool(trainer.state.tables) and step.number % self._steps_between_tables != 0
        must_be_complete = step.is_last or "save" in step.requested or trainer.must_stop
        with trainer.paused():
            trainer.save(without_tables=is_partial and not must_be_complete)
