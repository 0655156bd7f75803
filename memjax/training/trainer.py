"""The training loop: batch, step, hooks."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.profiler import StepTraceAnnotation
from jax.sharding import Mesh

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.checkpoint.errors import explained, write_advice
from memjax.config.run import RunConfig
from memjax.data.dataset import Dataset
from memjax.data.loader import TrainingData
from memjax.errors import CheckpointError
from memjax.io.console import say, warn
from memjax.models.decoder import Decoder
from memjax.monitoring.metrics import Row
from memjax.monitoring.progress import log_phase
from memjax.runs.folder import RunFolder
from memjax.runs.layout import DATA_ITER, META, TABLE_STATE, TABLES, meta_document
from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training.ending import saved_at_the_end
from memjax.training.evaluation_hooks import VALIDATION_LOSS
from memjax.training.first_batches import FirstBatches
from memjax.training.hook import Periodic
from memjax.training.hooks import with_standard_hooks
from memjax.training.in_flight import IN_FLIGHT, InFlight, Step
from memjax.training.interrupt import SAVED, Interrupt, any_process_interrupted
from memjax.training.program import TrainProgram
from memjax.training.start import first_state, newest_state
from memjax.training.state import TrainState, to_items
from memjax.training.step import make_train_step


class Trainer:
    """One run, from its newest checkpoint (or from scratch) to its last step.

    Attributes:
        program: the model's structure and the optimizers.
        state: the state after the newest step, which the device may still be computing. Available from `Hook.begin` on;
            a hook may replace it.
        first_step: the step from which the run resumed; 0 in a new run.
        last_step: the last step that was dispatched to the device.
        newest_row: the metrics of the newest step that has been read.
        compile_seconds: how long the training step took to compile.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        folder: RunFolder,
        dataset: Dataset,
        interrupt: Interrupt,
        *,
        record: Callable[[int], None] = lambda step: None,
        hooks: Iterable[Periodic] = (),
    ):
        """Sets up the run, under an ambient mesh that is the given one.

        `record` is called with the step from which the run resumes, before the first row. `hooks` come in addition to
        those that the config asks for.
        """
        self.config, self.mesh, self.folder, self.dataset, self.interrupt = config, mesh, folder, dataset, interrupt
        self.program = TrainProgram.of(config)
        keep = config.checkpoint
        self.checkpoints = Checkpoints(folder.checkpoints, keep=keep.keep, keep_best=keep.keep_best, verify=keep.verify)
        self.hooks = with_standard_hooks(hooks, self.program, folder, mesh)
        self.first_step = self.last_step = 0
        self.newest_row: Row = {}
        self._any_process_interrupted = any_process_interrupted(interrupt, mesh)
        self._all_must_stop = False
        self._in_flight = InFlight(lambda: record(self.first_step))

    def run(self) -> TrainState:
        """Trains to the last step, saves, and returns the final state.

        Errors on the host are raised after the steps so far have been saved.

        Raises:
            NotFinite: a loss or gradient is not finite.
            Preempted: a signal asked the run to stop.
            ConfigError: the first batches have no target token.
            DataError: the data cannot be read.
            CheckpointError: a checkpoint cannot be written or read, or a file of the run cannot be used.
        """
        with explained(CheckpointError, str(self.folder.path), advice=write_advice, only=OSError):
            log_phase("opening the data")
            self._data = TrainingData(self.dataset, seed=self.config.run.seed)
            try:
                self._run()
            finally:
                self._data.close()
                self.checkpoints.close()
        return self.state

    def _run(self) -> None:
        for line in self.dataset.describe(self.config.train.steps):
            say(line)
        self._begin()
        self._first_batches = FirstBatches(self.config.data, first_step=self.first_step)
        with contextlib.ExitStack() as stack:
            for periodic in self.hooks:
                periodic.hook.begin(self)
                stack.callback(periodic.hook.end, self)
            stack.callback(self.checkpoints.wait)
            if self.first_step >= self.config.train.steps:
                return
            batch = self._next_batch()
            self._compile(batch)
            with self.interrupt.deferred():
                with saved_at_the_end(self):
                    self._train(batch)
                self.interrupt.exit_code = SAVED

    def _train(self, batch: dict[str, jax.Array]) -> None:
        """The loop over batch, step and hooks, until the last step or a signal."""
        first = self.first_step + 1
        for number in range(first, self.config.train.steps + 1):
            if self.must_stop:
                break
            batch = batch if number == first else self._next_batch()
            for periodic in self.hooks:
                periodic.hook.before_step(self, number)
            step = self._step(number, batch)
            for periodic in self.hooks:
                if periodic.is_due(step):
                    periodic.hook.after_step(self, step)
            self._read()

    def _next_batch(self) -> dict[str, jax.Array]:
        """The next batch, on the devices."""
        started = time.monotonic()
        batch = next(self._data)
        # A batch that arrives while a step is still being computed costs no time.
        self._data_wait = time.monotonic() - started if self._in_flight.is_done else 0.0
        self._first_batches.check(batch, last=self.last_step + 1 == self.config.train.steps)
        accumulate = self.config.train.grad_accum_steps
        micro = {name: rows.reshape(accumulate, -1, rows.shape[-1]) for name, rows in batch.items()}
        return put_batch(self.mesh, micro, MICRO_BATCHES)

    def _step(self, number: int, batch: dict[str, jax.Array]) -> Step:
        """Dispatches a step to the device, without waiting for it."""
        with StepTraceAnnotation("train", step_num=number):
            self.state, metrics = self._train_step(self.state, batch)
        self.last_step = number
        if jax.process_count() > 1:
            metrics["must_stop"] = self._any_process_interrupted()
        step = Step(number, self._data.get_state(), is_last=number == self.config.train.steps)
        step.host_metrics |= {"throughput/data_wait_seconds": self._data_wait} | self.dataset.malformed_counts()
        step.add(metrics)
        self._in_flight.push(step)
        return step

    @property
    def must_stop(self) -> bool:
        """Whether a signal asked the run to stop; the same in all processes at the same step."""
        return self._all_must_stop if jax.process_count() > 1 else self.interrupt.name is not None

    def model(self) -> Decoder:
        """The model in its current state, whose arrays the next step overwrites."""
        return self.program.parts.merge(self.state.params, self.state.tables)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work other than training: waits for the steps in flight, and does not count towards their time."""
        # A step's time starts when the previous one is read, so that one must be read before the newest finishes. Its
        # progress line also comes before what is printed in the pause.
        self._read()
        jax.block_until_ready(self.state.step)
        with self._in_flight.stopwatch.paused():
            yield

    @property
    def num_in_flight(self) -> int:
        """Number of steps whose rows have not been passed to the hooks yet."""
        return len(self._in_flight)

    def finish_steps(self) -> None:
        """Waits for the steps in flight, and passes their rows to the hooks."""
        self._read(keep=0)

    def add_late_metrics(self, step: int, metrics: Row) -> None:
        """Adds metrics to a row that has already been written."""
        for periodic in self.hooks:
            periodic.hook.on_late_metrics(self, step, metrics)

    def check_saves(self) -> None:
        """Checks on the save in the background.

        Raises:
            CheckpointError: the save failed.
        """
        self.checkpoints.check()
        if self.interrupt.exit_code != SAVED and self.checkpoints.latest() is not None:
            self.interrupt.exit_code = SAVED

    def save(self, *, without_tables: bool = False, despite_hooks: bool = False) -> None:
        """Saves the state and the position in the data after its last step; all rows up to it are written first.

        Without tables the checkpoint is partial. With despite_hooks a hook whose `state` raises is left out, with a
        warning.
        """
        self.finish_steps()
        step = int(self.state.step)
        meta = meta_document(self.config, self.dataset.tokenizer, step=step)
        meta["hooks"] = {}
        for name, hook in ((periodic.name, periodic.hook) for periodic in self.hooks):
            try:
                meta["hooks"][name] = hook.state()
            except Exception as error:
                if not despite_hooks:
                    raise
                warn(f"hook {name}: its state is not saved: {type(error).__name__}: {error}")
        loss = self.newest_row.get(VALIDATION_LOSS) if self.newest_row.get("step") == step else None
        items = to_items(self.state)
        if without_tables:
            items = {name: item for name, item in items.items() if name not in (TABLES, TABLE_STATE)}
        documents = {DATA_ITER: self._saved_position, META: meta}
        self.checkpoints.save(step, items, documents, loss=loss, partial=without_tables)

    def _begin(self) -> None:
        """Restores the newest readable state with the data's position and the hooks, or creates the first state."""
        self.check_saves()
        found = newest_state(self.program, self.mesh, self.checkpoints)
        if found is None:
            self.state, self._saved_position = first_state(self.program, self.mesh), self._data.get_state()
            return
        self.state, self._saved_position, meta = found
        self.first_step = self.last_step = int(self.state.step)
        self._data.set_state(self._saved_position)
        for periodic in self.hooks:
            saved = meta["hooks"].get(periodic.name) if "hooks" in meta else meta
            if saved is not None:
                periodic.hook.restore(saved, self.first_step)
        say(f"resumed from step {self.first_step}")

    def _compile(self, batch: dict[str, jax.Array]) -> None:
        """Compiles the step ahead of its first call, and restarts the stopwatch: time before this was not training."""
        started = time.monotonic()
        log_phase("compiling the training step")
        self.interrupt.rearm()
        self._train_step = make_train_step(self.program, self.mesh).lower(self.state, batch).compile()
        self.compile_seconds = time.monotonic() - started
        say(f"compiled the training step in {self.compile_seconds:.1f} s")
        self._in_flight.stopwatch.lap()
        self._data_wait = 0.0

    def _read(self, *, keep: int = IN_FLIGHT) -> None:
        """Passes rows to the hooks until `keep` steps are in flight; all hooks get a row, even if one of them raises.

        A row may end the run, so all processes read each row at the same point, however fast they are.
        """
        for step, row in self._in_flight.finished(keep=keep):
            self._all_must_stop |= bool(row.pop("must_stop", False))
            self._saved_position = step.data_position
            with contextlib.ExitStack() as stack:
                stack.callback(setattr, self, "newest_row", row)
                for periodic in reversed(self.hooks):  # the stack calls the newest first
                    stack.callback(periodic.hook.on_row, self, row)
