"""The training loop: data -> step -> metrics, with validation, checkpoints and a safe end."""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.config import DataConfig, RunConfig
from memjax.data.dataset import Dataset
from memjax.data.loader import TrainingData
from memjax.data.packing import Batch
from memjax.errors import ConfigError
from memjax.evaluation.perplexity import validation_loss
from memjax.loading import META, PARAMS, TABLES, meta_document
from memjax.memory.parallel import TOKENS
from memjax.models.counts import training_flops_per_token
from memjax.models.trees import params_to_tree, tree_to_params
from memjax.training.interrupt import Interrupt, shared_wish
from memjax.training.mesh import put_batch
from memjax.training.metrics import MetricsFile, Progress, Row, Stopwatch, peak_flops, tell_phase
from memjax.training.processes import is_first
from memjax.training.profiling import ProfileWindow
from memjax.training.run_folder import RunFolder
from memjax.training.start import OPT_STATE, first_state
from memjax.training.state import Trainer, TrainState
from memjax.training.step import BATCH, make_train_step, make_usage_report
from memjax.training.trackers import close_trackers, make_trackers

TABLE_STATE, DATA_ITER = "table_state", "data_iter"
"""Items of a checkpoint beside OPT_STATE and those of `memjax.loading`."""

MAX_PENDING = 16
"""Steps that may be in flight before the loop waits for the oldest."""

LAG = 2
"""Steps that are in flight when one is read, where several processes must read the same ones at the same time."""

PATIENCE = 8
"""Batches without a learned token that a run may begin with."""


class NotFinite(Exception):
    """A loss or gradient is not a number; the state before that step is saved."""


class Preempted(Exception):
    """A signal, to this process or another, ended the run after a checkpoint."""


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

    def __init__(self, config: RunConfig, mesh: Mesh, folder: RunFolder, dataset: Dataset, interrupt: Interrupt):
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
        self.first_batches = FirstBatches(config.data)

    def run(self) -> TrainState:
        """Trains to the last step and returns the final state, saved.

        Raises:
            NotFinite: the loss or a gradient is not a number.
            Preempted: a signal asked for the end.
            ConfigError: the first batches have no learned token.
            DataError: the data cannot be read.
            CheckpointError: a checkpoint cannot be written or read.
        """
        tell_phase("opening the data")
        data = TrainingData(self.dataset, seed=self.config.run.seed)
        for line in self.dataset.describe(self.config.train.steps):
            print(line, flush=True)
        self.malformed = self.dataset.malformed_counts()
        try:
            self.state, self.saved_place = self._start(data)
            self.first = int(self.state.step)
            self.metrics = MetricsFile(self.folder.metrics, last_step=self.first) if is_first() else None
            self.progress = Progress(
                first_step=self.first, steps=self.config.train.steps, every_seconds=self.config.log.progress_seconds
            )
            self.trackers = make_trackers(self.config, self.folder.path, last_step=self.first) if is_first() else []
            try:
                for step in range(self.first + 1, self.config.train.steps + 1):
                    self._one_step(data, step)
            except NotFinite as error:
                self._save()
                raise NotFinite(f"{error} The state before it is saved as step {int(self.state.step)}.") from None
            finally:
                self.profile.abandon()
                try:
                    self.checkpoints.wait()
                finally:
                    if self.metrics:
                        self.metrics.close()
                    close_trackers(self.trackers)
            return self.state
        finally:
            data.close()
            self.checkpoints.close()

    def _one_step(self, data: TrainingData, step: int) -> None:
        """A training step, and what is due after it."""
        config, last = self.config, step == self.config.train.steps
        batch = next(data)
        self.first_batches.look(batch, last=last)
        micro = {name: rows.reshape(config.train.accumulate, -1, rows.shape[-1]) for name, rows in batch.items()}
        micro = put_batch(self.mesh, micro, BATCH)
        if step == self.first + 1:
            self._compile(micro)
        if self.profile.opens(step):
            with self._aside():
                self.profile.start(step)
        with self.profile.step(step):
            self.state, metrics = self.train_step(self.state, micro)
        if jax.process_count() > 1:
            metrics["must_stop"] = self.wish_to_stop()
        self.pending.append(_Pending(step, metrics, data.get_state(), dict(self.malformed)))
        if self.profile.closes(step, last=last):
            with self._aside():
                self.profile.stop(step)
        self.checkpoints.check()
        self._read(wait=len(self.pending) >= MAX_PENDING)
        if config.model.lookups and (last or step % config.log.usage_every == 0):
            self.pending[-1].metrics |= self._report_usage()
        improved = self._validate(step)
        stop = self.must_stop or (jax.process_count() == 1 and self.interrupt.name is not None)
        if last or improved or stop or step % config.checkpoint.every == 0:
            self._read(wait=True, all_of_them=True)
            light = bool(self.state.tables) and step % config.checkpoint.steps_between_tables != 0
            with self._aside():
                self._save(without_tables=light and not (last or improved or stop))
        if stop and not last:
            why = self.interrupt.name or "another process was told to stop"
            raise Preempted(f"{why}: step {step} is saved; the same command goes on from there")

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For what is not training: begins when the steps under way are done, and does not count as their time."""
        jax.block_until_ready(self.state.step)
        with self.stopwatch.paused():
            yield

    def _compile(self, batch: dict[str, jax.Array]) -> None:
        """Compiles the step ahead of its first call, and starts the stopwatch: what came before was not training."""
        started = time.monotonic()
        tell_phase("compiling the training step")
        self.train_step = make_train_step(self.trainer, self.mesh).lower(self.state, batch).compile()
        self.compile_seconds = time.monotonic() - started
        print(f"compiled the training step in {self.compile_seconds:.1f} s", flush=True)
        self.stopwatch = Stopwatch()

    def _report_usage(self) -> dict[str, Any]:
        """Slot statistics since the last ones, on the device. The first call compiles."""
        if self._reported:
            self.state, usage = self.usage_report(self.state)
        else:
            with self._aside():
                self.state, usage = self.usage_report(self.state)
        self._reported = True
        return usage

    def _start(self, data: TrainingData) -> tuple[TrainState, dict[str, Any]]:
        """The newest state that can be read, or the first one, and the data's place; data is moved there."""
        steps, whole = self.checkpoints.steps(), self.checkpoints.latest()
        if steps and steps[-1] != whole:
            place = "the beginning" if whole is None else f"step {whole}"
            print(f"step {steps[-1]} was saved without tables, so the run goes on from {place}", flush=True)
        if whole is None:
            return first_state(self.trainer, self.mesh), data.get_state()
        shardings = self.trainer.shardings(self.mesh)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.trainer.abstract_state(),
            shardings,
        )
        tell_phase("restoring the newest checkpoint")
        restored = self.checkpoints.restore(_items(abstract), [DATA_ITER, META])
        place = restored.documents[DATA_ITER]
        data.set_state(place)
        best = restored.documents[META].get("best_loss")
        self.best_loss = float("inf") if best is None else best
        print(f"resumed from step {restored.step}", flush=True)
        return _state(self.trainer, restored.arrays), place

    def _validate(self, step: int) -> bool:
        """Writes the validation loss into the step's row; whether it is the best so far."""
        every = self.config.eval.every
        if step != self.config.train.steps and (every is None or step % every):
            return False
        with self._aside():
            model = self.trainer.parts.assemble(self.state.params, self.state.tables)
            batches = self.dataset.validation_batches(self.config.eval.batches)
            loss = validation_loss(model, batches, place=lambda batch: put_batch(self.mesh, batch, TOKENS))
        if np.isnan(loss):  # nothing is held out
            return False
        self.pending[-1].host_metrics["eval/validation/loss"] = loss
        improved = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        print(f"step {step}: validation loss {loss:.4f}" + (" (best so far)" if improved else ""), flush=True)
        return improved and self.config.checkpoint.keep_best

    def _read(self, *, wait: bool, all_of_them: bool = False) -> None:
        """Writes the rows of finished steps. The newest one stays in flight, so that the device never runs dry.

        What a row says may end the run, so several processes read each at the same point, however fast they are.

        Raises:
            NotFinite: a step was not finite.
        """
        ready = []
        keep = 0 if all_of_them else 1
        if jax.process_count() > 1 and not all_of_them:
            keep, wait = LAG, True
        while len(self.pending) > keep and (wait or self.pending[0].metrics["train/loss"].is_ready()):
            ready.append(self.pending.popleft())
        if not ready:
            return
        values = jax.device_get([pending.metrics for pending in ready])
        seconds = self.stopwatch.lap() / len(ready)
        for pending, metrics in zip(ready, values, strict=True):
            if not metrics.pop("healthy"):
                self.pending.clear()
                raise NotFinite(
                    f"step {pending.step}: not a number somewhere (loss {metrics['train/loss']:.4g}, gradient norm "
                    f"{metrics['train/grad_norm']:.4g}). Try a lower optim.lr or optim.table.lr, or look at the data."
                )
            self.must_stop |= bool(metrics.pop("must_stop", False))
            self.saved_place = pending.place
            row: Row = {"step": pending.step, **{name: value.item() for name, value in metrics.items()}}
            row |= pending.host_metrics | self._throughput(row["train/tokens"], seconds)
            self.newest_row = row
            if self.metrics:
                self.metrics.write(row)
            for tracker in self.trackers:
                tracker.write(row)
            self.progress.show(row)
        if self.metrics:
            self.metrics.flush()

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
        meta = meta_document(self.config, self.dataset.tokenizer, step=step) | {"best_loss": best}
        loss = self.newest_row.get("eval/validation/loss") if self.newest_row.get("step") == step else None
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
