"""The training loop: data -> step -> metrics, with validation, checkpoints and a safe end."""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.checkpoint.errors import explained, write_advice
from memjax.config.data import DataConfig
from memjax.config.run import RunConfig
from memjax.data.dataset import Dataset
from memjax.data.loader import TrainingData
from memjax.data.packing import Batch
from memjax.errors import CheckpointError, ConfigError, DataError
from memjax.evaluation.perplexity import validation_loss
from memjax.io.console import say, warn
from memjax.models.counts import training_flops_per_token
from memjax.monitoring.metrics import WINDOW, MetricsFile, Row, peak_flops, read_metrics
from memjax.monitoring.profile import ProfileWindow
from memjax.monitoring.progress import ProgressLines, Stopwatch, tell_phase
from memjax.monitoring.trackers.start import CLOSE_SECONDS, close_trackers, make_trackers
from memjax.runs.folder import RunFolder
from memjax.runs.layout import (
    DATA_ITER,
    META,
    OPT_STATE,
    PARAMS,
    TABLE_STATE,
    TABLES,
    meta_document,
    params_to_tree,
    tree_to_params,
)
from memjax.sharding.axes import TOKENS
from memjax.sharding.mesh import put_batch
from memjax.sharding.processes import is_first
from memjax.training.interrupt import SAVED, Interrupt, shared_wish
from memjax.training.program import Trainer
from memjax.training.start import first_state
from memjax.training.state import TrainState
from memjax.training.step import BATCH, make_train_step, make_usage_report

IN_FLIGHT = 1
"""Steps under way while the loop waits for the one before: one computes while the next is made ready. With more, a
signal, a NaN or a progress line would only wait longer."""

STOP_SECONDS = 5.0
"""How long a run that was told to stop waits for its trackers."""

VALIDATION_LOSS = "eval/validation/loss"

PATIENCE = 8
"""Batches without a learned token that a run may begin with."""


class NotFinite(Exception):
    """A loss or gradient is not a number; the state before that step is saved."""


class Preempted(Exception):
    """A signal, to this process or another, ended the run after a checkpoint."""


class _Stopped(Exception):
    """A signal came during the validation."""


@dataclasses.dataclass
class _Pending:
    """A step that was given to the device, and what the host knows of it."""

    step: int
    metrics: dict[str, Any]
    """On the device: reading them waits for the step."""
    place: dict[str, Any]
    """Where the data was after the step's batch."""
    host_metrics: Row = dataclasses.field(default_factory=dict)


class Loop:
    """One run, from the newest checkpoint (or from nothing) to its last step."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        folder: RunFolder,
        dataset: Dataset,
        interrupt: Interrupt,
        record: Callable[[int], None] = lambda step: None,
    ):
        """Takes what a run needs; `record` is called with the step that it goes on from, before the first row."""
        self.record = record
        self.config, self.mesh, self.folder, self.dataset, self.interrupt = config, mesh, folder, dataset, interrupt
        self.trainer = Trainer.of(config)
        keep = config.checkpoint
        self.checkpoints = Checkpoints(folder.checkpoints, keep=keep.keep, keep_best=keep.keep_best, verify=keep.verify)
        self.usage_report = make_usage_report(self.trainer, mesh)
        self.flops_per_token = training_flops_per_token(
            self.trainer.parts, config.data.sequence_length, freeze_dense=config.optim.freeze_dense
        )
        self.peak_flops = peak_flops(mesh.devices.flat[0])
        self.best_loss = float("inf")
        self.newest_row: Row = {}
        self.pending: deque[_Pending] = deque()
        self.profile = ProfileWindow(config.log.profile if is_first() else None, folder.profile)
        self.wish_to_stop = shared_wish(interrupt, mesh)
        self.must_stop = False
        """Known to all processes at the same step."""
        self.compile_seconds: float | None = None
        """Known once the step is compiled; None again once it is written."""
        self._reported = False
        self.tokens_seen: int | None = None
        """Tokens of all steps read so far, without padding."""
        self.usage_since = 0
        """The step after which the reads of the slots began to be counted."""
        self.validation_is_due = False
        """A signal has cut the validation of the last step short."""
        self.batches = 0
        self.last_step = 0
        """The last step that was given to the device."""
        self.first_batches = FirstBatches(config.data)

    def run(self) -> TrainState:
        """Trains to the last step and returns the final state, saved.

        Whatever the host meets on the way is raised after the steps so far are saved.

        Raises:
            NotFinite: a loss or gradient is not a number.
            Preempted: a signal asked for the end.
            ConfigError: the first batches have no learned token.
            DataError: the data cannot be read.
            CheckpointError: a checkpoint cannot be written or read, or a file of the run cannot be used.
        """
        with explained(CheckpointError, str(self.folder.path), advice=write_advice, only=OSError):
            tell_phase("opening the data")
            data = TrainingData(self.dataset, seed=self.config.run.seed)
            try:
                return self._run(data)
            finally:
                data.close()
                self.checkpoints.close()

    def _run(self, data: TrainingData) -> TrainState:
        for line in self.dataset.describe(self.config.train.steps):
            say(line)
        self.malformed = self.dataset.malformed_counts()
        if self.checkpoints.latest() is not None:
            self.interrupt.exit_code = SAVED
        self.state, self.saved_place = self._start(data)
        self.first = self.last_step = int(self.state.step)
        self.metrics = MetricsFile(self.folder.metrics, last_step=self.first) if is_first() else None
        if self.tokens_seen is None:  # of a checkpoint that does not say
            self.tokens_seen = sum(row.get("train/tokens") or 0 for row in read_metrics(self.folder.metrics))
        self.progress = ProgressLines(
            first_step=self.first, steps=self.config.train.steps, every_seconds=self.config.log.progress_seconds
        )
        self.trackers = make_trackers(self.config, self.folder.path, last_step=self.first) if is_first() else []
        try:
            if self.validation_is_due:
                self._make_up_validation()
            if self.first < self.config.train.steps:
                batch = self._next(data)
                self._compile(batch)
                with self.interrupt.deferred():
                    self._steps(data, batch)
        finally:
            self.profile.abandon()
            try:
                self.checkpoints.wait()
            finally:
                if self.metrics:
                    self.metrics.close()
                close_trackers(self.trackers, STOP_SECONDS if self.interrupt.name else CLOSE_SECONDS)
        return self.state

    def _steps(self, data: TrainingData, batch: dict[str, jax.Array]) -> None:
        """All steps that are left, beginning with a batch."""
        try:
            for step in range(self.first + 1, self.config.train.steps + 1):
                if self._must_stop():
                    break
                self._one_step(batch if step == self.first + 1 else self._next(data), step, data)
            self.checkpoints.wait()
            if self._must_stop():
                self._preempt()
            self.interrupt.exit_code = SAVED
        except NotFinite as error:
            if int(self.state.step) == self.first:  # no step was made: other settings may begin here
                raise
            self._save()
            raise NotFinite(f"{error} The state before it is saved as step {int(self.state.step)}.") from None
        except (Preempted, CheckpointError, ConfigError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if self._must_stop() and isinstance(error, DataError):
                self._preempt()  # signals to a group of processes end those that read the data, too
            saved = self._save_after_an_error()
            if isinstance(error, DataError):
                raise DataError(f"{error}\n{saved}") from error
            warn(saved)
            raise

    def _next(self, data: TrainingData) -> dict[str, jax.Array]:
        """The next batch, on the devices."""
        batch = next(data)
        self.batches += 1
        self.first_batches.look(batch, last=self.first + self.batches == self.config.train.steps)
        accumulate = self.config.train.accumulate
        micro = {name: rows.reshape(accumulate, -1, rows.shape[-1]) for name, rows in batch.items()}
        return put_batch(self.mesh, micro, BATCH)

    def _one_step(self, batch: dict[str, jax.Array], step: int, data: TrainingData) -> None:
        """A training step, and what is due after it."""
        config, last = self.config, step == self.config.train.steps
        if self.profile.opens(step):
            with self._aside():
                self.profile.start(step)
        with self.profile.step(step):
            self.state, metrics = self.train_step(self.state, batch)
        self.last_step = step
        if jax.process_count() > 1:
            metrics["must_stop"] = self.wish_to_stop()
        self.pending.append(_Pending(step, metrics, data.get_state(), dict(self.malformed)))
        if self.profile.closes(step, last=last):
            with self._aside():
                self.profile.stop(step)
        self.checkpoints.check()
        if self.interrupt.exit_code != SAVED and self.checkpoints.latest() is not None:
            self.interrupt.exit_code = SAVED
        self._report_usage(step)
        for value in self.pending[-1].metrics.values():
            value.copy_to_host_async()
        improved = self._validate(step)
        self._read()
        if last or improved or step % config.checkpoint.every == 0:
            light = bool(self.state.tables) and step % config.checkpoint.steps_between_tables != 0
            self._read(keep=0)
            with self._aside():
                self._save(without_tables=light and not (last or improved or self._must_stop()))

    def _must_stop(self) -> bool:
        """Whether a signal asks for the end; the same in all processes at the same step."""
        return self.must_stop if jax.process_count() > 1 else self.interrupt.name is not None

    def _preempt(self) -> NoReturn:
        """Saves and raises."""
        if self.last_step == 0:
            self.interrupt.end()
        self._read(keep=0)
        with self._aside():
            self._save()
        self.checkpoints.wait()
        why = self.interrupt.name or "another process was told to stop"
        raise Preempted(f"{why}: step {self.last_step} is saved; the same command goes on from there")

    def _save_after_an_error(self) -> str:
        """Saves the steps that are done and says so; raises nothing that would hide the error."""
        if jax.process_count() > 1:
            # An error may be that of one process alone, and the others would not come to the save.
            return "The same command goes on from the newest checkpoint."
        try:
            self._read(keep=0)
        except NotFinite as error:
            warn(str(error))
        except OSError as error:  # without the run's settings no step is of use
            return f"The steps since the last checkpoint could not be saved: {error.strerror or error}"
        step = int(self.state.step)
        if step == 0:
            return "There was no step to save yet."
        try:
            self._save()
            self.checkpoints.wait()
        except CheckpointError as error:
            return f"The state after step {step} could not be saved: {error}"
        return f"The state after step {step} is saved; the same command goes on from there."

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For what is not training: begins when the steps under way are done, and does not count as their time."""
        # A step's time is that since the one before was read, which is done while the newest is under way; its line
        # comes before what is printed aside, too.
        self._read()
        jax.block_until_ready(self.state.step)
        with self.stopwatch.paused():
            yield

    def _compile(self, batch: dict[str, jax.Array]) -> None:
        """Compiles the step ahead of its first call, and starts the stopwatch: what came before was not training."""
        started = time.monotonic()
        tell_phase("compiling the training step")
        self.interrupt.rearm()
        self.train_step = make_train_step(self.trainer, self.mesh).lower(self.state, batch).compile()
        self.compile_seconds = time.monotonic() - started
        say(f"compiled the training step in {self.compile_seconds:.1f} s")
        self.stopwatch = Stopwatch()

    def _report_usage(self, step: int) -> None:
        """Adds slot statistics to the newest step when a window of steps ends with it. The first call compiles.

        Only windows of the same length can be compared, so one that a changed `log.usage_every` has cut short is
        dropped. A run shorter than one window reports what there is at its end, and goes on counting if it is extended.
        """
        if not self.config.model.lookups:
            return
        every, window = self.config.log.usage_every, step - self.usage_since
        short = step == self.config.train.steps and step < every
        if not short and step % every:
            return
        reads = jax.tree.map(jax.numpy.copy, self.state.reads) if short else None
        with contextlib.nullcontext() if self._reported else self._aside():
            self.state, usage = self.usage_report(self.state)
        self._reported = True
        if reads is not None:
            self.state = dataclasses.replace(self.state, reads=reads)
        else:
            self.usage_since = step
        if short or window == every:
            self.pending[-1].metrics |= usage
            self.pending[-1].host_metrics[WINDOW] = window

    def _start(self, data: TrainingData) -> tuple[TrainState, dict[str, Any]]:
        """The newest state that can be read, or the first one, and the data's place; data is moved there."""
        steps, complete = self.checkpoints.steps(), self.checkpoints.complete()
        if steps and steps[-1:] != complete[-1:]:
            place = f"step {complete[-1]}" if complete else "the beginning"
            say(f"step {steps[-1]} was saved without tables, so the run goes on from {place}")
        if not complete:
            self.tokens_seen = 0
            return first_state(self.trainer, self.mesh), data.get_state()
        shardings = self.trainer.shardings(self.mesh)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.trainer.abstract_state(),
            shardings,
        )
        tell_phase("restoring the newest checkpoint")
        restored = self.checkpoints.restore(_items(abstract), [DATA_ITER, META])
        place, meta = restored.documents[DATA_ITER], restored.documents[META]
        data.set_state(place)
        self._take_up(meta, restored.step)
        say(f"resumed from step {restored.step}")
        return _state(self.trainer, restored.arrays), place

    def _take_up(self, meta: Mapping[str, Any], step: int) -> None:
        """What the loop keeps in a checkpoint; those of before 0.2 have the best loss only."""
        best = meta.get("best_loss")
        self.best_loss = float("inf") if best is None else best
        self.tokens_seen = meta.get("tokens_seen")
        log, steps = meta["config"].get("log", {}), meta["config"].get("train", {}).get("steps")
        every = log.get("usage_every") or self.config.log.usage_every
        # They counted anew after the last step of a run.
        self.usage_since = meta.get("usage_since", step if step == steps else step - step % every)
        self.validation_is_due = meta.get("validation_is_due", False)

    def _validate(self, step: int) -> bool:
        """Measures the validation loss when it is due, for the step's row; whether it is the best so far."""
        every = self.config.eval.every
        if step != self.config.train.steps and (every is None or step % every):
            return False
        with self._aside():
            loss = self._validation_loss()
        if loss is None:
            self.validation_is_due = True  # by who goes on from here
            return False
        if np.isnan(loss):  # nothing is held out
            return False
        improved = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        self.pending[-1].host_metrics[VALIDATION_LOSS] = loss
        self._read(keep=0)
        say(f"step {step}: validation loss {loss:.4f}" + (" (best so far)" if improved else ""))
        return improved and self.config.checkpoint.keep_best

    def _validation_loss(self) -> float | None:
        """The loss of the state; None if a signal came before it was known."""

        def until_stopped(batches: Iterator[Batch]) -> Iterator[Batch]:
            # Several processes must validate the same batches, so they do not stop here.
            for batch in batches:
                if jax.process_count() == 1 and self.interrupt.name is not None:
                    raise _Stopped
                yield batch

        model = self.trainer.parts.assemble(self.state.params, self.state.tables)
        batches = self.dataset.validation_batches(self.config.eval.batches)
        try:
            return validation_loss(
                model, until_stopped(batches), place=lambda batch: put_batch(self.mesh, batch, TOKENS)
            )
        except _Stopped:
            return None

    def _make_up_validation(self) -> None:
        """Measures what a signal has cut short at the end of the run before, and adds it to the row of that step."""
        loss = self._validation_loss()
        if loss is None:
            return
        self.validation_is_due = False
        if np.isnan(loss):
            return
        self.best_loss = min(loss, self.best_loss)
        more: Row = {VALIDATION_LOSS: loss}
        if self.metrics:
            self.metrics.amend(self.first, more)
        for tracker in self.trackers:
            tracker.write({"step": self.first} | more)
        say(f"step {self.first}: validation loss {loss:.4f}")

    def _read(self, *, keep: int = IN_FLIGHT) -> None:
        """Writes the rows of steps until so many are in flight: enough that the device never runs dry.

        Waits for the steps that it reads. What a row says may end the run, so several processes read each at the same
        point, however fast they are.

        Raises:
            NotFinite: a step was not finite.
        """
        while len(self.pending) > keep:
            pending = self.pending[0]
            metrics = jax.device_get(pending.metrics)
            seconds = self.stopwatch.lap()
            if not metrics.pop("healthy"):
                self.pending.clear()
                raise NotFinite(
                    f"step {pending.step}: not a number somewhere (loss {metrics['train/loss']:.4g}, gradient norm "
                    f"{metrics['train/grad_norm']:.4g}). Try a lower optim.lr or optim.table.lr, or look at the data."
                )
            self.record(self.first)  # before the step leaves the queue: a disk that refuses this loses no row
            self.pending.popleft()
            self.must_stop |= bool(metrics.pop("must_stop", False))
            self.saved_place = pending.place
            row: Row = {"step": pending.step, **{name: value.item() for name, value in metrics.items()}}
            self.tokens_seen = (self.tokens_seen or 0) + row["train/tokens"]
            row |= {"train/tokens_seen": self.tokens_seen}
            row |= pending.host_metrics | self._throughput(row["train/tokens"], seconds)
            self.newest_row = row
            if self.metrics:
                self.metrics.write(row)
                self.metrics.flush()
            for tracker in self.trackers:
                tracker.write(row)
            self.progress.show(row)

    def _throughput(self, tokens: int, seconds: float) -> Row:
        speed = tokens / max(seconds, 1e-9)
        row: Row = {"throughput/step_seconds": seconds, "throughput/tokens_per_second": speed}
        if self.peak_flops:
            row["throughput/mfu"] = speed * self.flops_per_token / (self.peak_flops * self.mesh.size)
        if self.compile_seconds is not None:
            row["throughput/compile_seconds"], self.compile_seconds = self.compile_seconds, None
        return row

    def _save(self, *, without_tables: bool = False) -> None:
        """Saves the state with the data's place after its last step. Every row up to it is written before."""
        step = int(self.state.step)
        best = self.best_loss if np.isfinite(self.best_loss) else None
        meta = meta_document(self.config, self.dataset.tokenizer, step=step)
        meta |= {"best_loss": best, "tokens_seen": self.tokens_seen, "usage_since": self.usage_since}
        meta |= {"validation_is_due": self.validation_is_due}
        loss = self.newest_row.get(VALIDATION_LOSS) if self.newest_row.get("step") == step else None
        items = _items(self.state)
        if without_tables:
            items = {name: item for name, item in items.items() if name not in (TABLES, TABLE_STATE)}
        documents = {DATA_ITER: self.saved_place, META: meta}
        self.checkpoints.save(step, items, documents, loss=loss, partial=without_tables)


class FirstBatches:
    """Refuses data of which nothing is learned: cut to sequences that end before the answers begin, for example."""

    def __init__(self, data: DataConfig):
        self._data = data
        self._unlearned: int | None = 0
        """Batches without a learned token; None once there was one with."""

    def look(self, batch: Batch, *, last: bool) -> None:
        """Takes the next batch; `last` when no other will follow.

        Raises:
            ConfigError: no batch so far has a learned token, and there were enough of them.
        """
        if self._unlearned is None:
            return
        self._unlearned = None if batch["loss_mask"].any() else self._unlearned + 1
        if self._unlearned and (last or self._unlearned == PATIENCE):
            raise ConfigError([self._why()])

    def _why(self) -> str:
        data = self._data
        found = f"no token of the first {self._unlearned} batches is learned"
        if data.packing == "none":
            return (
                f"data.sequence_length={data.sequence_length} is too short for data.packing=none, which cuts every "
                f"record there: {found}; raise data.sequence_length, or set data.packing to first_fit"
            )
        return (
            f"data.sequence_length={data.sequence_length} x data.batch_size={data.batch_size} holds nothing but "
            f"prompts: {found}; raise one of them, or look at what the records have under "
            f"data.answer_key={data.answer_key}"
        )


def _items(state: TrainState) -> dict[str, Any]:
    """The checkpoint's items that hold a state."""
    items = {
        PARAMS: params_to_tree(state.params),
        OPT_STATE: state.opt_state,
        TABLE_STATE: {"optimizer": state.table_state, "reads": state.reads, "step": state.step},
    }
    return items | ({TABLES: state.tables} if state.tables else {})


def _state(trainer: Trainer, items: dict[str, Any]) -> TrainState:
    """The state that the items hold."""
    step = items[TABLE_STATE]["step"]
    return TrainState(
        step=step,
        healthy=jax.numpy.ones((), bool, device=step.sharding),
        params=tree_to_params(trainer.parts, items[PARAMS]),
        opt_state=items[OPT_STATE],
        tables=items.get(TABLES, {}),
        table_state=items[TABLE_STATE]["optimizer"],
        reads=items[TABLE_STATE]["reads"],
    )
