"""Saves a run that ends before its last step, and says so in the error."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import jax

from memjax.errors import CheckpointError, ConfigError, DataError
from memjax.io.console import warn
from memjax.training.in_flight import NotFinite

if TYPE_CHECKING:
    from memjax.training.trainer import Trainer


class Preempted(Exception):
    """A signal to this process or another ended the run, after a checkpoint was saved."""


@contextlib.contextmanager
def saved_at_the_end(trainer: "Trainer") -> Iterator[None]:
    """Saves the finished steps, whatever ends the block.

    Raises:
        NotFinite, Preempted, DataError: see `Trainer.run`; their messages say what was saved.
    """
    try:
        yield
        trainer.checkpoints.wait()
        if trainer.must_stop:
            _preempt(trainer)
    except NotFinite as error:
        if int(trainer.state.step) == trainer.first_step:  # no step was made: a run with other settings may start here
            raise
        trainer.save(despite_hooks=True)
        raise NotFinite(f"{error} The state before it is saved as step {int(trainer.state.step)}.") from None
    except (Preempted, CheckpointError, ConfigError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if trainer.must_stop and isinstance(error, DataError):
            _preempt(trainer)  # a signal to the process group also ends the processes that read the data
        saved = _save_after_an_error(trainer)
        if isinstance(error, DataError):
            raise DataError(f"{error}\n{saved}") from error
        warn(saved)
        raise


def _preempt(trainer: "Trainer") -> NoReturn:
    """Saves, then raises Preempted."""
    if trainer.last_step == 0:
        trainer.interrupt.end()
    trainer.finish_steps()
    with trainer.paused():
        trainer.save()
    trainer.checkpoints.wait()
    why = trainer.interrupt.name or "another process was interrupted"
    raise Preempted(f"{why}: step {trainer.last_step} is saved; the same command resumes from there")


def _save_after_an_error(trainer: "Trainer") -> str:
    """Saves the finished steps and returns a message; raises nothing that would hide the error."""
    if jax.process_count() > 1:
        # The error may have happened in this process alone, and the others would not take part in the save.
        return "The same command resumes from the latest checkpoint."
    while under_way := trainer.num_in_flight:
        try:
            trainer.finish_steps()
        except Exception as error:
            if trainer.num_in_flight == under_way:  # the run's settings, which every step needs, could not be written
                reason = getattr(error, "strerror", None) or error
                return f"The steps since the last checkpoint could not be saved: {reason}"
            warn(str(error) if isinstance(error, NotFinite) else f"{type(error).__name__}: {error}")
    step = int(trainer.state.step)
    if step == 0:
        return "There was no step to save yet."
    try:
        trainer.save(despite_hooks=True)
        trainer.checkpoints.wait()
    except Exception as error:
        return f"The state after step {step} could not be saved: {error}"
    return f"The state after step {step} is saved; the same command resumes from there."
