"""The loop's pauses, saves and errors in hooks; test_main.py and tests/end_to_end cover whole runs."""

import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.runs.layout import DATA_ITER, META
from memjax.training import trainer as trainer_module
from memjax.training.ending import saved_at_the_end
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


class Failing(Hook):
    """Raises in the methods given."""

    def __init__(self, *where: str):
        self.where, self.restored = where, []

    def on_row(self, trainer, row):
        if "on_row" in self.where:
            raise ValueError(f"row {row['step']}")

    def state(self):
        if "state" in self.where:
            raise ValueError("no state")
        return {"kept": 1}

    def restore(self, saved, step):
        self.restored.append(saved)


class Saves:
    """Records what a trainer saves."""

    def save(self, step, items, documents, **_):
        self.step, self.documents = step, documents

    def wait(self):
        pass


@pytest.fixture
def trainer(monkeypatch) -> Any:
    """A trainer with two steps in flight, and a hook that records rows."""
    monkeypatch.setattr(trainer_module, "to_items", lambda state: {})
    monkeypatch.setattr(trainer_module, "meta_document", lambda config, tokenizer, *, step: {"step": step})
    trainer: Any = Trainer.__new__(Trainer)
    seen, rows = Hook(), []
    seen.on_row = lambda trainer, row: rows.append(row["step"])
    trainer.rows = rows
    trainer.hooks = [Periodic("seen", seen)]
    trainer.state, trainer.config = SimpleNamespace(step=np.int32(2)), None
    trainer.dataset, trainer.checkpoints = SimpleNamespace(tokenizer=None), Saves()
    trainer.newest_row, trainer.interrupt = {}, SimpleNamespace(name=None)
    trainer._in_flight, trainer._all_must_stop = InFlight(), False
    for number in (1, 2):
        metrics = {"train/loss": jnp.float32(1), "healthy": jnp.bool_(True)}
        trainer._in_flight.push(Step(number, {"after": number}, device_metrics=metrics))
    return trainer


@pytest.mark.parametrize("is_computing", [False, True])
def test_a_batch_is_waited_for_only_when_the_device_has_nothing_to_compute(trainer, monkeypatch, is_computing):
    def batches():
        time.sleep(0.05)
        yield {"tokens": np.zeros((2, 4))}

    trainer._data, trainer._first_batches = batches(), SimpleNamespace(check=lambda batch, last: None)
    trainer.config = SimpleNamespace(train=SimpleNamespace(steps=9, grad_accum_steps=1))
    trainer.last_step, trainer.mesh = 2, None
    monkeypatch.setattr(trainer_module, "put_batch", lambda mesh, batch, axes: jax.tree.map(jnp.asarray, batch))
    if is_computing:
        running = SimpleNamespace(is_ready=lambda: False)
        trainer._in_flight.push(Step(3, {}, device_metrics={"train/loss": running}))
    trainer._next_batch()
    assert (trainer._data_wait >= 0.05) == (not is_computing)
    assert is_computing == (trainer._data_wait == 0)


@pytest.mark.parametrize("where", [("on_row",), ("on_row", "state")], ids=str)
def test_a_hook_that_raises_loses_neither_the_steps_so_far_nor_their_rows(trainer, where, capsys):
    trainer.hooks.insert(0, Periodic("mine", Failing(*where)))
    with pytest.raises(ValueError, match="row 1"), saved_at_the_end(trainer):
        trainer._read()
    assert trainer.rows == [1, 2]
    saved = trainer.checkpoints
    assert (saved.step, saved.documents[DATA_ITER]) == (2, {"after": 2})
    kept = {"seen": {}} if "state" in where else {"mine": {"kept": 1}, "seen": {}}
    assert saved.documents[META]["hooks"] == kept
    told = capsys.readouterr().err
    assert "ValueError: row 2" in told
    assert "The state after step 2 is saved" in told
    assert ("hook mine: its state is not saved: ValueError: no state" in told) == ("state" in where)


def test_an_error_that_no_save_survives_is_still_the_one_raised(trainer, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "save", lambda **_: 1 / 0)
    with pytest.raises(KeyError), saved_at_the_end(trainer):
        raise KeyError
    assert "The state after step 2 could not be saved: division by zero" in capsys.readouterr().err


def test_steps_are_lost_together_where_the_settings_cannot_be_written(trainer, capsys):
    trainer._in_flight._before_each = lambda: 1 / 0
    with pytest.raises(KeyError), saved_at_the_end(trainer):
        raise KeyError
    assert "The steps since the last checkpoint could not be saved: division by zero" in capsys.readouterr().err


def test_a_save_comes_after_the_rows_of_all_steps(trainer):
    trainer.save()
    assert trainer.rows == [1, 2]
    assert trainer.checkpoints.documents[DATA_ITER] == {"after": 2}


@pytest.mark.parametrize(
    ("meta", "restored"),
    [({"hooks": {"mine": {"kept": 1}}}, [{"kept": 1}]), ({"hooks": {}}, []), ({"config": {}}, [{"config": {}}])],
    ids=["known", "new", "a checkpoint without hooks"],
)
def test_a_hook_is_restored_from_what_it_kept(trainer, monkeypatch, meta, restored):
    hook = Failing()
    trainer.hooks, trainer.program, trainer.mesh = [Periodic("mine", hook)], None, None
    trainer.check_saves, trainer._data = lambda: None, SimpleNamespace(set_state=lambda position: None)
    monkeypatch.setattr(trainer_module, "newest_state", lambda *_: (trainer.state, {}, meta))
    trainer._begin()
    assert hook.restored == restored
