"""The loop's pauses. Whole runs: test_main.py and tests/end_to_end."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from memjax.training.hook import Hook, Periodic
from memjax.training.in_flight import InFlight, Step
from memjax.training.trainer import Trainer


def test_a_pause_in_training_leaves_every_step_its_own_time():
    trainer, written = Trainer.__new__(Trainer), []

    class Rows(Hook):
        def on_row(self, trainer, row):
            written.append(row["step"])

    trainer.state = SimpleNamespace(step=np.int32(2))
    trainer.hooks, trainer._in_flight, trainer._all_must_stop = [Periodic("rows", Rows())], InFlight(), False
    for number in (1, 2):
        metrics = {"train/loss": jnp.float32(1), "healthy": jnp.bool_(True)}
        trainer._in_flight.push(Step(number, {}, device_metrics=metrics))
    with trainer.paused():
        assert written == [1]
        assert len(trainer._in_flight) == 1
    trainer.finish_steps()
    assert written == [1, 2]
