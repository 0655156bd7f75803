"""Hooks that evaluate the model while it trains."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from memjax.config.run import RunConfig
from memjax.data.packing import Batch
from memjax.data.sources import biographies
from memjax.evaluation.perplexity import validation_loss
from memjax.evaluation.recall import recall
from memjax.io.console import say
from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import TOKENS
from memjax.training.hook import Hook
from memjax.training.in_flight import Step

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer

VALIDATION_LOSS = "eval/validation/loss"


class _Stopped(Exception):
    """A signal came during the evaluation."""


def _is_stopped(trainer: "Trainer") -> bool:
    """Whether to stop for a signal. Several processes must evaluate the same batches, so they do not."""
    return jax.process_count() == 1 and trainer.interrupt.name is not None


class Validate(Hook):
    """Measures the validation loss for the step's row, and has the best state so far saved.

    What a signal cuts short is measured by who goes on from there, at the begin.
    """

    def __init__(self, config: RunConfig):
        """Has measured nothing yet."""
        self._batches, self._keep_best = config.eval.batches, config.checkpoint.keep_best
        self.best_loss = float("inf")
        self._is_overdue = False

    def state(self) -> dict[str, Any]:
        """The best loss, and whether a validation is overdue."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_loss": best, "validation_is_due": self._is_overdue}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """The best loss, and whether a validation is overdue."""
        best = saved.get("best_loss")
        self.best_loss = float("inf") if best is None else best
        self._is_overdue = saved.get("validation_is_due", False)

    def begin(self, trainer: "Trainer") -> None:
        """Measures what is overdue, for the row of the step before."""
        if not self._is_overdue or (loss := self._loss(trainer)) is None:
            return
        self._is_overdue = False
        if math.isnan(loss):
            return
        self.best_loss = min(loss, self.best_loss)
        trainer.add_late_metrics(trainer.first_step, {VALIDATION_LOSS: loss})
        say(f"step {trainer.first_step}: validation loss {loss:.4f}")

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        """Measures; requests a save of the best state so far."""
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
        """The loss of the trainer's state; None if a signal came before it was known."""

        def until_stopped(batches: Iterator[Batch]) -> Iterator[Batch]:
            for batch in batches:
                if _is_stopped(trainer):
                    raise _Stopped
                yield batch

        batches = until_stopped(trainer.dataset.validation_batches(self._batches))
        try:
            return validation_loss(trainer.model(), batches, place=lambda batch: put_batch(trainer.mesh, batch, TOKENS))
        except _Stopped:
            return None


class Facts(Hook):
    """Asks a model of biographies for facts, for the step's row: how it learns them while it trains."""

    def __init__(self, config: RunConfig):
        """Takes the questions: about people who are asked about in training, and those who are only told."""
        people, limit = config.data.biographies, config.eval.recall_people
        self._questions = {
            name: biographies.questions(people, asked=name == "asked", limit_people=limit)
            for name in ("asked", "held_out")
        }

    def after_step(self, trainer: "Trainer", step: Step) -> None:
        """Asks, unless a signal comes; the end of a run has a test of its own."""
        if step.is_last:
            return

        def place(batch: Batch) -> dict[str, jax.Array]:
            if _is_stopped(trainer):
                raise _Stopped
            return put_batch(trainer.mesh, batch, TOKENS)

        accuracies = {}
        with trainer.paused(), contextlib.suppress(_Stopped):
            for name, questions in self._questions.items():
                if questions:
                    size = -(-256 // trainer.mesh.size) * trainer.mesh.size
                    tokenizer = trainer.dataset.tokenizer
                    found = recall(trainer.model(), tokenizer, questions, batch_size=size, place=place)
                    accuracies[f"eval/facts/{name}"] = found.accuracy
            step.host_metrics |= accuracies
