"""Hooks that evaluate the model while it trains."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from memjax.config.run import RunConfig
from memjax.data.packing import Batch
from memjax.data.sources import biographies
from memjax.errors import ConfigError, DataError
from memjax.evaluation.model import EvalModel
from memjax.evaluation.offline import forbid_downloads, require_lm_eval
from memjax.evaluation.perplexity import validation_loss
from memjax.evaluation.question_sets.formats import read_question_sets
from memjax.evaluation.question_sets.report import question_report
from memjax.evaluation.recall import recall
from memjax.io.console import say
from memjax.sharding.mesh import divisible, put_batch
from memjax.sharding.rules import TOKENS
from memjax.training.hook import Hook
from memjax.training.in_flight import Step

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer

VALIDATION_LOSS = "eval/validation/loss"


class _Stopped(Exception):
    """A signal arrived during the evaluation."""


def _is_stopped(trainer: "Trainer") -> bool:
    """Whether to stop for a signal. Several processes do not, because all must evaluate the same batches."""
    return jax.process_count() == 1 and trainer.interrupt.name is not None


def _place(trainer: "Trainer") -> Callable[[Batch], dict[str, jax.Array]]:
    """Puts batches on the devices, until a signal arrives."""

    def place(batch: Batch) -> dict[str, jax.Array]:
        if _is_stopped(trainer):
            raise _Stopped
        return put_batch(trainer.mesh, batch, TOKENS)

    return place


class Validate(Hook):
    """Adds the validation loss to the step's row, and requests a save of the best state so far.

    A validation interrupted by a signal is repeated when the run resumes.
    """

    def __init__(self, config: RunConfig):
        self._batches, self._keep_best = config.eval.batches, config.checkpoint.keep_best
        self.best_loss = float("inf")
        self._is_overdue = False

    def state(self) -> dict[str, Any]:
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_loss": best, "validation_is_due": self._is_overdue}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        best = saved.get("best_loss")
        self.best_loss = float("inf") if best is None else best
        self._is_overdue = saved.get("validation_is_due", False)

    def begin(self, trainer: "Trainer") -> None:
        """Runs an overdue validation, for the row of the previous step."""
        if not self._is_overdue or (loss := self._loss(trainer)) is None:
            return
        self._is_overdue = False
        if math.isnan(loss):
            return
        self.best_loss = min(loss, self.best_loss)
        trainer.add_late_metrics(trainer.first_step, {VALIDATION_LOSS: loss})
        say(f"step {trainer.first_step}: validation loss {loss:.4f}")

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        with trainer.paused():
            loss = self._loss(trainer)
        if loss is None:
            self._is_overdue = True
            return
        if math.isnan(loss):  # nothing is held out
            return
        is_best = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        step.host_metrics[VALIDATION_LOSS] = loss
        trainer.finish_steps()
        say(f"step {step.number}: validation loss {loss:.4f}" + (" (best so far)" if is_best else ""))
        if is_best and self._keep_best:
            step.requested.add("save")

    def _loss(self, trainer: "Trainer") -> float | None:
        """The loss of the trainer's state; None if a signal arrived before it was known."""
        batches = trainer.dataset.validation_batches(self._batches)
        with contextlib.suppress(_Stopped):
            return validation_loss(trainer.model(), batches, place=_place(trainer))
        return None


class Facts(Hook):
    """Adds the recall of facts to the step's row, for models of biographies."""

    def __init__(self, config: RunConfig):
        people, limit = config.data.biographies, config.eval.recall_people
        self._questions = {
            name: biographies.questions(people, asked=name == "asked", limit_people=limit)
            for name in ("asked", "held_out")
        }

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        """Measures recall, unless a signal arrives. The end of a run has its own test."""
        if step.is_last:
            return
        accuracies = {}
        with trainer.paused(), contextlib.suppress(_Stopped):
            for name, questions in self._questions.items():
                if questions:
                    found = recall(
                        trainer.model(),
                        trainer.dataset.tokenizer,
                        questions,
                        batch_size=divisible(256, trainer.mesh),
                        place=_place(trainer),
                    )
                    accuracies[f"eval/facts/{name}"] = found.accuracy
            step.host_metrics |= accuracies


class Questions(Hook):
    """Adds the results of question sets and lm-eval tasks to the step's row."""

    def __init__(self, config: RunConfig):
        """Reads the questions and loads the tasks once, so that problems show before the first step.

        Raises:
            ConfigError: lm-eval is missing, a task is unknown, or there are several processes.
            DataError: a set cannot be read, or a task cannot be loaded.
        """
        asked = self._asked = config.eval
        require_lm_eval("eval.tasks", asked.tasks)
        if jax.process_count() > 1:
            raise ConfigError(
                "eval.questions and eval.tasks are for one process; use python -m memjax.evaluate on checkpoints"
            )
        self._sets = read_question_sets(asked.questions, field="eval.questions") if asked.questions else []
        if asked.tasks:
            if not (config.run.mirror or "").startswith("hf://"):  # else the mirror needs those libraries online
                forbid_downloads()
            from memjax.evaluation.harness import load_tasks  # takes seconds

            load_tasks(asked.tasks, asked.task_folder, section="eval.")

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        if _is_stopped(trainer):
            return
        config = trainer.config
        with trainer.paused():
            model = EvalModel(
                model=trainer.model(),
                tokenizer=trainer.dataset.tokenizer,
                max_length=config.data.sequence_length,
                batch_size=divisible(64, trainer.mesh),
                progress_seconds=config.log.progress_seconds,
            )
            if self._sets:
                report = question_report(model, self._sets, limit=self._asked.question_limit, zero_tables=False)
                for entry in report["sets"]:
                    for name, value in entry["metrics"].items():
                        step.host_metrics[f"eval/questions/{entry['name']}/{name}"] = value
            if self._asked.tasks:
                step.host_metrics |= self._of_tasks(model)

    def _of_tasks(self, model: EvalModel) -> dict[str, float]:
        from memjax.evaluation.harness import task_report  # takes seconds

        asked = self._asked
        report = task_report(
            model, asked.tasks, folder=asked.task_folder, limit=asked.question_limit, zero_tables=False
        )
        if report["failed"]:
            raise DataError("; ".join(report["failed"].values()))
        return {
            f"eval/tasks/{task}/{metric.removesuffix(',none')}": value
            for task, results in report["results"].items()
            for metric, value in results.items()
            if isinstance(value, float)
        }
