"""Each hook alone, with a trainer that only records calls."""

import contextlib
import dataclasses
import json
import math
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig, RunFolderConfig
from memjax.config.training import EvalConfig
from memjax.errors import ConfigError, DataError
from memjax.runs.folder import RunFolder
from memjax.training import evaluation_hooks, hooks, mirror
from memjax.training.evaluation_hooks import VALIDATION_LOSS, Facts, Validate
from memjax.training.hook import Hook, Periodic
from memjax.training.hooks import (
    Save,
    SlotUsage,
    Throughput,
    with_standard_hooks,
)
from memjax.training.in_flight import Step
from memjax.training.program import TrainProgram


@dataclasses.dataclass
class State:
    step: int = 0
    reads: Any = dataclasses.field(default_factory=dict)
    tables: Any = dataclasses.field(default_factory=lambda: {"shared": 1})


class FakeTrainer:
    """Records the calls of hooks, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.state, self.program, self.mesh, self.must_stop, self.first_step = State(), None, None, False, 0
        self.interrupt = SimpleNamespace(name=None)
        self.dataset = SimpleNamespace(validation_batches=lambda count: iter([{}] * 3))

    @contextlib.contextmanager
    def paused(self):
        self.calls.append("paused")
        yield

    def model(self):
        return None

    def finish_steps(self) -> None:
        self.calls.append("finish_steps")

    def check_saves(self) -> None:
        self.calls.append("check_saves")

    def save(self, *, without_tables: bool = False) -> None:
        self.calls.append("light" if without_tables else "complete")

    def add_late_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self.calls.append((step, metrics))


@pytest.mark.parametrize(
    ("every", "due"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7]), (None, [7])]
)
def test_a_hook_is_due_at_its_period_and_after_the_last_step(every, due):
    periodic = Periodic("any", Hook(), every)
    assert [number for number in range(1, 8) if periodic.is_due(Step(number, {}, is_last=number == 7))] == due
    assert periodic.is_due(Step(1, {}, requested={"any"}))


@pytest.mark.parametrize("every", [0, -3])
def test_a_period_of_zero_steps_is_refused(every):
    with pytest.raises(ValueError, match=rf"hook mine: every={every} must be 1 or more, or None"):
        Periodic("mine", Hook(), every)


@pytest.fixture
def trainer() -> Any:
    return FakeTrainer()


@pytest.fixture
def validating(trainer, monkeypatch):
    """validating(losses): a validation that returns these losses; None stands for an interrupting signal."""

    def validating(*losses: float | None) -> Validate:
        remaining = iter(losses)

        def validation_loss(model, batches, **_):
            loss = next(remaining)
            for _ in batches:
                if loss is None:
                    trainer.interrupt.name = "SIGTERM"
            return loss

        monkeypatch.setattr(evaluation_hooks, "validation_loss", validation_loss)
        return Validate(RunConfig())

    return validating


def test_only_the_best_state_so_far_is_saved_and_its_row_is_complete(trainer, validating, capsys):
    validate = validating(2.0, 1.0, 1.5, math.nan)
    steps = [Step(number, {}) for number in (1, 2, 3, 4)]
    for step in steps:
        validate.after_step(trainer, step)
    assert [step.requested for step in steps] == [{"save"}, {"save"}, set(), set()]
    assert [step.host_metrics for step in steps] == [{VALIDATION_LOSS: loss} for loss in (2.0, 1.0, 1.5)] + [{}]
    assert validate.state() == {"best_loss": 1.0, "validation_is_due": False}
    assert trainer.calls == ["paused", "finish_steps"] * 3 + ["paused"]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "step 2: validation loss 1.0000 (best so far)",
        "step 3: validation loss 1.5000",
    ]


def test_an_interrupted_validation_is_made_up_on_resumption(trainer, validating):
    validate = validating(None)
    step = Step(8, {})
    validate.after_step(trainer, step)
    assert step.host_metrics == {}
    saved = json.loads(json.dumps(validate.state()))
    assert saved == {"best_loss": None, "validation_is_due": True}

    trainer.interrupt.name, trainer.first_step, trainer.calls = None, 8, []
    validate = validating(0.5)
    validate.restore(saved, 8)
    validate.begin(trainer)
    assert trainer.calls == [(8, {VALIDATION_LOSS: 0.5})]
    assert validate.state() == {"best_loss": 0.5, "validation_is_due": False}


def test_the_last_step_a_request_and_a_signal_save_the_tables_too(trainer):
    save = Save(steps_between_tables=10)
    found = []
    for step, must_stop in (
        (Step(5, {}), False),
        (Step(10, {}), False),
        (Step(15, {}, is_last=True), False),
        (Step(5, {}, requested={"save"}), False),
        (Step(5, {}), True),
    ):
        trainer.must_stop, trainer.calls = must_stop, []
        save.after_step(trainer, step)
        assert trainer.calls[:2] == ["finish_steps", "paused"], "rows are written before the state is"
        found.append(trainer.calls[2])
    assert found == ["light", "complete", "complete", "complete", "complete"]
    trainer.state.tables, trainer.calls = {}, []
    save.after_step(trainer, Step(5, {}))
    assert trainer.calls[2] == "complete", "without tables there is nothing to leave out"


@pytest.fixture
def counting(monkeypatch):
    """Replaces slot statistics by the number of reads since the last report."""

    def report(state):
        return dataclasses.replace(state, reads={"L1": jnp.int32(0)}), {"memory/L1/used": state.reads["L1"]}

    monkeypatch.setattr(hooks, "make_usage_report", lambda program, mesh: report)


def usage_of(trainer, usage: SlotUsage, first: int, last: int, every: int) -> dict[int, tuple[int, int]]:
    """Runs steps of one read each; returns the reads and the window of each row that reports them."""
    periodic, rows = Periodic("slot_usage", usage, every), {}
    for number in range(first, last + 1):
        step = Step(number, {}, is_last=number == last)
        trainer.state.reads["L1"] = trainer.state.reads["L1"] + 1
        if periodic.is_due(step):
            usage.after_step(trainer, step)
        if step.device_metrics:
            rows[number] = (int(step.device_metrics["memory/L1/used"]), step.host_metrics["slots/window_steps"])
    return rows


@pytest.mark.usefixtures("counting")
def test_slots_are_counted_over_windows_of_one_length(trainer):
    trainer.state.reads = {"L1": jnp.int32(0)}
    usage = SlotUsage(4)
    assert usage_of(trainer, usage, 1, 10, every=4) == {4: (4, 4), 8: (4, 4)}
    assert usage.state() == {"usage_since": 8}
    # The run is extended with a shorter window, so the unfinished window is dropped.
    extended = SlotUsage(3)
    extended.restore(usage.state(), 10)
    assert usage_of(trainer, extended, 11, 15, every=3) == {15: (3, 3)}


@pytest.mark.usefixtures("counting")
def test_a_run_shorter_than_a_window_reports_and_continues_counting_when_extended(trainer):
    trainer.state.reads = {"L1": jnp.int32(0)}
    usage = SlotUsage(10)
    assert usage_of(trainer, usage, 1, 6, every=10) == {6: (6, 6)}
    assert int(trainer.state.reads["L1"]) == 6
    assert usage_of(trainer, usage, 7, 12, every=10) == {10: (10, 10)}


@pytest.mark.parametrize(("step", "since"), [(25, 20), (40, 40)])
def test_usage_of_a_run_before_0_2_begins_at_the_window(step, since):
    usage = SlotUsage(10)
    usage.restore({"config": {"log": {"usage_every": 10}, "train": {"steps": 40}}}, step)
    assert usage.state() == {"usage_since": since}


@pytest.fixture(scope="module")
def program() -> TrainProgram:
    return TrainProgram.of(RunConfig(model=ModelConfig(num_layers=1, memory=None)))


@pytest.fixture
def throughput(program, monkeypatch) -> Throughput:
    """Two devices of 100 FLOP/s each, and a model that needs 3 FLOPs per token."""
    monkeypatch.setattr(TrainProgram, "flops_per_token", 3.0)
    monkeypatch.setattr(hooks, "peak_flops", lambda device: 100.0)
    return Throughput(program, jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]))


def test_rows_have_the_tokens_so_far_and_one_of_a_start_the_time_of_its_compilation(trainer, throughput):
    hook, trainer.compile_seconds = throughput, 7.0
    hook.restore({"tokens_seen": 1000}, 5)
    hook.begin(trainer)
    rows: list[dict[str, Any]] = [{"train/tokens": 50, "throughput/step_seconds": 2.0} for _ in range(2)]
    for row in rows:
        hook.on_row(trainer, row)
    assert [row["train/tokens_seen"] for row in rows] == [1050, 1100]
    assert rows[0]["throughput/tokens_per_second"] == 25.0
    assert rows[0]["throughput/mfu"] == 25.0 * 3.0 / 200.0
    assert [row.get("throughput/compile_seconds") for row in rows] == [7.0, None]
    assert hook.state() == {"tokens_seen": 1100}


def test_facts_are_asked_between_steps_and_left_to_the_report_at_the_end(trainer, monkeypatch):
    asked = []

    def recall(model, tokenizer, questions, *, batch_size, place):
        asked.append((tokenizer, len(questions), batch_size))
        return SimpleNamespace(accuracy=len(asked) / 4)

    monkeypatch.setattr(evaluation_hooks, "recall", recall)
    trainer.mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3])
    trainer.dataset.tokenizer = "tokenizer"
    config = RunConfig(eval=EvalConfig(recall_people=2, recall_every=5))
    facts, steps = Facts(config), [Step(5, {}), Step(7, {}, is_last=True)]
    for step in steps:
        facts.after_step(trainer, step)
    assert steps[0].host_metrics == {"eval/facts/asked": 0.25, "eval/facts/held_out": 0.5}
    assert steps[1].host_metrics == {}
    assert asked == [("tokenizer", 12, 258)] * 2
    assert trainer.calls == ["paused"]


def test_a_signal_ends_the_questions_about_facts_without_a_metric(trainer, monkeypatch):
    def recall(model, tokenizer, questions, *, batch_size, place):
        place({"tokens": np.ones((1, 4), np.int32)})
        trainer.interrupt.name = "SIGINT"
        return SimpleNamespace(accuracy=0.5)

    monkeypatch.setattr(evaluation_hooks, "recall", recall)
    monkeypatch.setattr(evaluation_hooks, "put_batch", lambda mesh, batch, spec: jax.device_put(batch))
    trainer.mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    trainer.dataset.tokenizer = "tokenizer"
    step = Step(5, {})
    Facts(RunConfig(eval=EvalConfig(recall_people=2, recall_every=5))).after_step(trainer, step)
    assert step.host_metrics == {}


@pytest.mark.parametrize("every", [5, None])
def test_facts_are_asked_if_the_config_says_so(tmp_path, every):
    config = RunConfig(model=ModelConfig(num_layers=1, memory=None), eval=EvalConfig(recall_every=every))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    found = with_standard_hooks([], TrainProgram.of(config), RunFolder(tmp_path), mesh)
    assert ("facts" in [hook.name for hook in found]) == (every is not None)


def test_rows_have_the_memory_in_use_if_the_device_reports_it(trainer, throughput):
    trainer.compile_seconds = 7.0
    row: dict[str, Any] = {"train/tokens": 50, "throughput/step_seconds": 2.0}
    throughput.on_row(trainer, row)
    assert not [name for name in row if name.startswith("device/")]
    sizes = {"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 9}
    throughput._device = SimpleNamespace(memory_stats=lambda: sizes)
    throughput.on_row(trainer, row)
    assert {name: row[name] for name in row if name.startswith("device/")} == {
        "device/bytes_in_use": 5,
        "device/peak_bytes_in_use": 7,
    }


def test_tokens_that_a_checkpoint_does_not_know_are_those_of_the_rows_before_it(trainer, throughput, tmp_path):
    hook, trainer.first_step, trainer.folder = throughput, 2, SimpleNamespace(metrics=tmp_path / "m")
    (tmp_path / "m").write_text("".join(f'{{"step": {step}, "train/tokens": 10}}\n' for step in (1, 2, 3)))
    hook.restore({}, 2)
    hook.begin(trainer)
    assert hook.state() == {"tokens_seen": 20}


def test_hooks_of_the_user_run_before_logs_and_checkpoints(program, tmp_path):
    folder, mesh = RunFolder(tmp_path), jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    found = with_standard_hooks([Periodic("mine", Hook())], program, folder, mesh)
    assert [periodic.name for periodic in found] == ["throughput", "mine", "log", "validate", "save"]
    with pytest.raises(ValueError, match="two hooks are named log: the names of hooks must be unique"):
        with_standard_hooks([Periodic("log", Hook())], program, folder, mesh)


def test_a_mirror_follows_complete_saves_and_stops_nothing(tmp_path, monkeypatch, capsys):
    trainer: Any = FakeTrainer()
    sent, steps = [], []
    trainer.checkpoints = SimpleNamespace(steps=lambda: steps)

    def push(folder, address):
        sent.append((folder, address, max(steps, default=None)))
        if len(sent) == 2:
            raise OSError("the store is gone")

    monkeypatch.setattr(mirror.remote, "push", push)
    monkeypatch.setattr(mirror, "LOOK_SECONDS", 0.0)
    hook = mirror.Mirror(tmp_path, "memory://bucket")
    for number in range(1, 8):
        if number in (3, 6):
            steps.append(number - 1)
        hook.before_step(trainer, number)
        if hook._thread:
            hook._thread.join()
    assert [step for *_, step in sent] == [2, 5]
    hook.end(trainer)
    assert sent[-1] == (tmp_path, "memory://bucket", 5)
    assert (
        "run.mirror=memory://bucket: the copy is not up to date: OSError: the store is gone" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("content", "problem"), [(None, "there is no such file"), ("{}\n", "capitals.jsonl")])
def test_questions_that_cannot_be_asked_are_refused_before_the_first_step(tmp_path, content, problem):
    path = tmp_path / "capitals.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=problem):
        evaluation_hooks.Questions(RunConfig(eval=EvalConfig(questions=(str(path),))))


def test_a_mirror_on_the_hub_keeps_its_library_online(monkeypatch):
    monkeypatch.setattr(evaluation_hooks, "forbid_downloads", lambda: pytest.fail("the mirror could not push"))
    harness = SimpleNamespace(load_tasks=lambda *_, **__: {})
    monkeypatch.setitem(sys.modules, "memjax.evaluation.harness", harness)
    run = RunFolderConfig(mirror="hf://buckets/me/run")
    evaluation_hooks.Questions(RunConfig(run=run, eval=EvalConfig(tasks=("arc",))))


def test_a_folder_that_cannot_be_listed_costs_its_mirror_one_line(tmp_path, monkeypatch, capsys):
    trainer: Any = FakeTrainer()

    def steps():
        raise OSError("stale file handle")

    trainer.checkpoints = SimpleNamespace(steps=steps)
    monkeypatch.setattr(mirror, "LOOK_SECONDS", 0.0)
    hook = mirror.Mirror(tmp_path, "memory://bucket")
    for number in (2, 3):
        hook.before_step(trainer, number)
    assert capsys.readouterr().err.count("OSError: stale file handle") == 1


def test_a_run_that_is_to_stop_does_not_wait_for_its_mirror(tmp_path, monkeypatch):
    trainer: Any = FakeTrainer()
    trainer.checkpoints = SimpleNamespace(steps=lambda: [1])
    released, pushed = threading.Event(), []
    monkeypatch.setattr(mirror.remote, "push", lambda *where: (pushed.append(where), released.wait(60)))
    monkeypatch.setattr(mirror, "STOP_SECONDS", 0.1)
    hook = mirror.Mirror(tmp_path, "memory://bucket")
    hook.before_step(trainer, 2)
    trainer.interrupt.name = "SIGTERM"
    started = time.monotonic()
    hook.end(trainer)
    released.set()
    assert time.monotonic() - started < 30
    assert len(pushed) == 1


def test_a_mirror_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    for address, problem in (
        (str(run / "copy"), "must be separate folders"),
        (str(tmp_path), "must be separate folders"),
        (str(tmp_path / "used"), "holds files that are not a mirror's"),
    ):
        with pytest.raises(ConfigError, match=problem):
            mirror.check_mirror(run, address)
    mirror.check_mirror(run, str(tmp_path / "new"))

    def unreachable(*where):
        raise OSError("no network")

    monkeypatch.setattr(mirror.remote, "why_not_mirror", unreachable)
    mirror.check_mirror(run, "memory://bucket")
    assert "run.mirror=memory://bucket: the copy is not up to date: OSError: no network" in capsys.readouterr().err


def test_questions_and_tasks_become_metrics_of_the_step(tmp_path, trainer, monkeypatch, as_users_call):
    questions = tmp_path / "capitals.jsonl"
    questions.write_text(json.dumps({"question": "Paris?", "answers": ["yes"]}) + "\n")
    config = RunConfig(eval=EvalConfig(questions=(str(questions),), tasks=("arc",), question_limit=7))
    trainer.config = config
    trainer.mesh, trainer.dataset = SimpleNamespace(size=3), SimpleNamespace(tokenizer=None)
    asked = {}

    def question_report(model, sets, **how):
        asked.update(how, batch_size=model.batch_size)
        return {"sets": [{"name": sets[0].name, "metrics": {"exact_match": 0.5}}]}

    def task_report(model, tasks, **how):
        results = {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": "arc"}
        return {"results": dict.fromkeys(tasks, results), "failed": {}}

    monkeypatch.setattr(evaluation_hooks, "EvalModel", SimpleNamespace)
    monkeypatch.setattr(evaluation_hooks, "question_report", question_report)
    loaded = []
    load_tasks = lambda tasks, folder, *, section: loaded.append((tasks, folder, section))
    harness = SimpleNamespace(task_report=task_report, load_tasks=load_tasks)
    monkeypatch.setitem(sys.modules, "memjax.evaluation.harness", harness)
    monkeypatch.setattr(evaluation_hooks, "forbid_downloads", lambda: loaded.append("offline"))
    hook, step = evaluation_hooks.Questions(config), Step(10, {})
    assert loaded == ["offline", (("arc",), None, "eval.")]
    hook.after_step(trainer, step)
    assert step.host_metrics == {
        "eval/questions/capitals/exact_match": 0.5,
        "eval/tasks/arc/acc": 0.25,
        "eval/tasks/arc/acc_stderr": 0.1,
    }
    assert asked == {"limit": 7, "zero_tables": False, "batch_size": 66}
    trainer.interrupt.name = "SIGTERM"
    stopped = Step(20, {})
    hook.after_step(trainer, stopped)
    assert stopped.host_metrics == {}
