"""The train command in this process: exit codes, messages, and what a failed run leaves behind."""

import gzip
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import pytest

from memjax import train
from memjax.checkpoint import CheckpointError, Checkpoints
from memjax.data.dataset import Dataset
from memjax.data.loader import TrainingData
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import ConfigError, DataError
from memjax.memory import sharded
from memjax.monitoring import metrics
from memjax.runs.load import load
from memjax.sharding.mesh import make_mesh
from memjax.training import evaluation_hooks, main, trainer
from memjax.training.program import TrainProgram

SETTINGS = """
--model.dim 16 --model.num_layers 2 --model.num_heads 2 --model.ffn_dim 24 --model.vocab_size 259
--model.memory.layers 1 --model.memory.num_keys 8 --model.memory.num_heads 2 --model.memory.top_k 3
--model.memory.key_dim 8
--data.source text --data.validation_fraction 0 --data.sequence_length 16 --data.batch_size 8 --data.packing concat
--data.tokenizer.kind byte
--optim.warmup_steps 2 --optim.table.warmup_steps 2 --train.steps 12 --checkpoint.every 4 --eval.every 100
--log.usage_every 5
"""
BAD_STEP = 7
SLOW_SECONDS = 4.0
"""Far longer than a few steps, even on a busy machine."""

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(folder, *settings): returns (exit code, output); uses one device unless `all_devices`."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"line {number} of a small corpus" for number in range(50)))

    def run(name: str, *settings: str, all_devices: bool = False) -> tuple[int, str]:
        if not all_devices:
            monkeypatch.setattr(main, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        arguments = [*SETTINGS.split(), "--data.path", str(corpus), "--run.dir", str(tmp_path / name), *settings]
        code = train.main(arguments)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--mesh.data", "3", "--data.batch_size", "6"], "mesh: data=3 x memory=1 needs 3 devices, found 8"),
        (
            ["--data.batch_size", "12"],
            "data.batch_size=12 must be a multiple of train.grad_accum_steps x devices = 1 x 8; try 16",
        ),
        (["--train.steps", "2"], "optim.warmup_steps=2 must be below train.steps=2; set --optim.warmup_steps 0.1"),
        (["--data.path", "null"], "data.path is null: source=text needs a file; set --data.path FILE"),
        *(
            ([f"--{name}", "float64"], f"{name}=float64 would be float32, because JAX's 64-bit types are off")
            for name in ("model.dtype", "model.param_dtype", "model.memory.table_dtype", "optim.table.moment_dtype")
        ),
    ],
)
def test_settings_that_cannot_run_here_end_with_2(run, settings, message):
    code, printed = run("refused", *settings, all_devices=True)
    assert code == 2
    assert message in printed


def test_attention_that_cannot_run_here_ends_with_2(run):
    code, printed = run("refused", "--train.attention", "cudnn")
    assert code == 2
    assert "train.attention=cudnn cannot run: needs an NVIDIA GPU, found cpu; set train.attention=auto" in printed


def trainer_that_fails(message: str) -> type:
    """A trainer whose device reports an error."""

    class Failing:
        def __init__(self, config, *_, **__):
            self.program = TrainProgram.of(config)

        def run(self):
            raise jax.errors.JaxRuntimeError(message)

    return Failing


def test_a_run_without_enough_memory_reports_its_needs_and_ends_with_7(run, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."
    monkeypatch.setattr(main, "Trainer", trainer_that_fails(message))
    code, printed = run("large")
    assert code == 7, printed
    assert "out of memory" in printed
    assert "bytes per device" in printed
    assert re.search(r"--data.batch_size 4 +\S+ MB less", printed), printed


def test_a_state_that_the_machine_has_no_memory_for_is_not_begun(run, monkeypatch, tmp_path):
    monkeypatch.setattr(main.host_memory, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(main, "Trainer", trainer_that_fails("INTERNAL: it was begun"))
    code, printed = run("huge")
    assert code == 7, printed
    assert "out of memory: a device has 0.01 MB for JAX" in printed
    assert "optimizer of the tables" in printed


def test_data_prepared_by_a_start_that_made_no_step_does_not_refuse_other_settings(run, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise ConfigError(["after the data is open"])

    monkeypatch.setattr(main, "Trainer", fails)
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n{"title": "three"}\n'))
    files = ("--data.source", "files", "--data.path", str(packed), "--data.malformed", "skip")
    for settings in ([], ["--data.text_key", "title"]):
        code, printed = run("tried", *files, *settings)
        assert code == 2
        assert "after the data is open" in printed
    code, printed = run("tried", *files, "--data.malformed", "strict")
    assert code == 3
    assert "corpus.jsonl.gz:3" in printed


def test_other_device_errors_are_not_taken_for_out_of_memory(run, monkeypatch):
    monkeypatch.setattr(main, "Trainer", trainer_that_fails("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run("broken")


def test_a_missing_file_ends_with_3(run, tmp_path):
    code, printed = run("lost", "--data.path", str(tmp_path / "nowhere.txt"))
    assert code == 3
    assert "nowhere.txt" in printed


def test_a_dry_run_writes_nothing(run, tmp_path):
    code, printed = run("dry", "--dry_run")
    assert code == 0
    assert "active per token" in printed
    assert "bytes per device" in printed
    assert not (tmp_path / "dry").exists()


def test_a_dry_run_without_its_data_prints_the_plan_and_a_line_and_ends_with_3(run, tmp_path):
    path = tmp_path / "nowhere.txt"
    code, printed = run("dry", "--dry_run", "--data.path", str(path))
    assert code == 3
    *plan, last = printed.splitlines()
    assert any("bytes per device" in line for line in plan)
    assert last == f"{path}: there is no such file; set data.path to a file that can be read"


def test_a_run_that_would_learn_nothing_ends_with_2(run, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a question that is too long", "answer": "yes"}\n' * 9)
    source = ["--data.source", "jsonl", "--data.path", str(tmp_path / "pairs.jsonl"), "--data.packing", "none"]
    steps = ["--train.steps", "1", "--optim.warmup_steps", "0", "--optim.table.warmup_steps", "0"]
    code, printed = run("unlearned", *source, *steps, "--model.memory", "null", "--model.num_layers", "1")
    assert code == 2
    assert "data.sequence_length=16 is too short for data.packing=none" in printed


def data_with(event: Callable[[], None], before_batch: int) -> type:
    """The run's data, with an event before one of its batches."""

    class Eventful(TrainingData):
        def __next__(self):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == before_batch:
                event()
            return super().__next__()

    return Eventful


def raises(error: Exception) -> Callable[[], None]:
    def event() -> None:
        raise error

    return event


@pytest.mark.slow
def test_host_errors_end_a_run_only_after_its_steps_are_saved(run, tmp_path, monkeypatch):
    settings = ["--model.num_layers", "1", "--model.memory", "null", "--train.steps", "9", "--log.tensorboard", "false"]
    settings += ["--checkpoint.every", "100"]
    folder = tmp_path / "host"

    def ended_by(event: Callable[[], None], before_batch: int) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "TrainingData", data_with(event, before_batch))
            return run("host", *settings)

    code, printed = ended_by(raises(DataError("corpus.txt: line 9 is damaged")), 1)
    assert code == 3, printed
    assert not (folder / "checkpoints").exists(), "there was nothing to save"
    code, printed = ended_by(lambda: os.kill(os.getpid(), signal.SIGUSR1), 3)
    assert code == 75, printed
    assert "SIGUSR1: step 3 is saved; the same command resumes from there" in printed
    code, printed = ended_by(raises(DataError("corpus.txt: line 9 is damaged")), 3)
    assert code == 3, printed
    assert "corpus.txt: line 9 is damaged\nThe state after step 5 is saved; the same command resumes" in printed
    code, printed = ended_by(raises(OSError(5, "Input/output error")), 2)
    assert code == 4, printed
    assert "The state after step 6 is saved" in printed
    assert f"{folder}: the disk reports an error" in printed
    code, printed = run("host", *settings)
    assert code == 0, printed
    assert "resumed from step 6\n" in printed
    assert steps_in(folder) == list(range(1, 10))


@pytest.mark.slow
@pytest.mark.usefixtures("heeding_hangups")
def test_a_validation_that_a_signal_cuts_short_is_made_up(run, tmp_path, monkeypatch):
    settings = ["--model.num_layers", "1", "--model.memory", "null", "--train.steps", "4", "--log.tensorboard", "false"]
    settings += ["--data.validation_fraction", "0.2", "--eval.every", "2"]
    real = Dataset.validation_batches

    def signalled(*arguments, **more):
        for batch in real(*arguments, **more):
            os.kill(os.getpid(), signal.SIGHUP)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "validation_batches", signalled)
        code, printed = run("cut", *settings)
    assert code == 75, printed
    assert "SIGHUP: step 2 is saved" in printed
    assert "validation loss" not in printed
    code, printed = run("cut", *settings)
    assert code == 0, printed
    assert re.search(r"resumed from step 2\n(.*\n)*?step 2: validation loss \d", printed), printed
    code, straight = run("straight", *settings)
    assert code == 0, straight
    losses = [
        metrics.read_metrics(tmp_path / name / "metrics.jsonl").values("eval/validation/loss").tolist()
        for name in ("cut", "straight")
    ]
    assert str(losses[0]) == str(losses[1])
    assert [math.isfinite(loss) for loss in losses[0]] == [False, True, False, True]
    # A step's validation line comes after the lines of the steps before it.
    shown = re.findall(r"^\S+ \S+  step +(\d+)", straight, re.MULTILINE)
    assert shown == sorted(shown, key=int)


@pytest.mark.slow
def test_a_run_resumes_from_the_newest_checkpoint_with_tables(run, tmp_path, monkeypatch, capsys):
    small = [
        "--model.num_layers",
        "1",
        "--model.memory.layers",
        "0",
        "--train.steps",
        "6",
        "--log.tensorboard",
        "false",
    ]
    often = ["--checkpoint.every", "1", "--checkpoint.tables", "every 3", "--checkpoint.keep", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "TrainingData", data_with(raises(jax.errors.JaxRuntimeError("INTERNAL: gone")), 6))
        with pytest.raises(jax.errors.JaxRuntimeError):
            run("light", *small, *often)
    assert re.search(r"\d\.\d s   drawing parameters and tables\n", capsys.readouterr().out), (
        "the slow phases are reported"
    )
    folder = tmp_path / "light"
    saved = Checkpoints(folder / "checkpoints")
    assert (saved.steps(), saved.complete()) == ([3, 5], [3])
    assert load(folder).step == 3
    with pytest.raises(CheckpointError, match=r"step 5 was saved without its tables; the newest step .* is 3"):
        load(folder, step=5)

    code, printed = run("light", *small, *often)
    assert code == 0, printed
    assert "step 5 was saved without tables, so the run resumes from step 3\n" in printed
    assert re.search(r"\d\.\d s   restoring the newest checkpoint\n", printed)
    assert "resumed from step 3\n" in printed
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]
    assert Checkpoints(folder / "checkpoints").complete() == [6]


def slow_validation(*_, **__) -> float:
    time.sleep(SLOW_SECONDS)
    return 2.0


def steps_in(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_meets_a_nan_keeps_its_last_good_state_and_can_be_mended(tiny, run, tmp_path, monkeypatch):
    make_train_step = trainer.make_train_step

    def make_poisoned_step(program, mesh):
        healthy, poisoned, calls = make_train_step(program, mesh), make_train_step(program, mesh), []

        def step(state, batch):
            calls.append(batch)
            if len(calls) != BAD_STEP:
                return healthy(state, batch)
            with monkeypatch.context() as patch:
                patch.setattr(sharded, "bag", tiny.poisoned_bag(0))
                return poisoned(state, batch)

        return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: step))

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_train_step", make_poisoned_step)
        code, printed = run("run")
    assert code == 5, printed
    # Loss and dense gradient norm are finite, but the step has also checked the table's gradient.
    assert re.search(rf"step {BAD_STEP}: a value is not finite \(loss \d+\.\d+, gradient norm \d+\.\d+\)", printed), (
        printed
    )
    assert f"The state before it is saved as step {BAD_STEP - 1}." in printed
    assert steps_in(folder) == list(range(1, BAD_STEP))
    assert Checkpoints(folder / "checkpoints").latest() == BAD_STEP - 1
    assert not (folder / "summary.json").exists()
    saved = load(folder)
    assert saved.step == BAD_STEP - 1
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(saved.model.tables))
    assert isinstance(saved.tokenizer, ByteTokenizer)
    shutil.copytree(folder, tmp_path / "damaged")

    # Changed settings are refused by name, unless explicitly allowed.
    code, printed = run("run", "--optim.lr", "0.003", "--model.ffn_dim", "32")
    assert code == 2
    assert "optim.lr" in printed
    assert "0.003" in printed
    assert "model.ffn_dim" in printed
    assert steps_in(folder) == list(range(1, BAD_STEP))
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_hooks, "validation_loss", slow_validation)
        extra = ["--log.profile.start", "9", "--log.profile.steps", "2"]
        code, printed = run("run", "--optim.lr", "0.003", "--checkpoint.every", "5", "--allow_changed", *extra)
    assert code == 0, printed
    assert f"resumed from step {BAD_STEP - 1}" in printed
    assert "changed: optim.lr" in printed
    assert steps_in(folder) == list(range(1, 13))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 12
    assert all(pathlib.Path(path).stat().st_size > 0 for path in summary["plots"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Steps 11 and 12 do not fill a window of 5.
    assert [row["step"] for row in rows if "memory/L1/used_fraction" in row] == [5, 10]
    assert [row["slots/window_steps"] for row in rows if "slots/window_steps" in row] == [5, 5]
    assert "were read equally often (steps 6 to 10)" in printed
    assert [row["train/tokens_seen"] for row in rows] == list(itertools.accumulate(row["train/tokens"] for row in rows))
    # Each start reports its compile time once; step times include neither that nor validations.
    compiled = {row["step"]: row["throughput/compile_seconds"] for row in rows if "throughput/compile_seconds" in row}
    assert list(compiled) == [1, BAD_STEP]
    assert f"compiled the training step in {compiled[BAD_STEP]:.1f} s" in printed
    assert rows[BAD_STEP - 1]["throughput/step_seconds"] < compiled[BAD_STEP]
    assert sum(row["throughput/step_seconds"] for row in rows[BAD_STEP - 1 :]) < SLOW_SECONDS
    assert [row["step"] for row in rows if row.get("eval/validation/loss") == 2.0] == [12]
    assert "profile of the steps 9 to 10" in printed
    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert len(list((folder / "tensorboard").iterdir())) == 2

    for file in (tmp_path / "damaged" / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, printed = run("damaged")
    assert code == 4
    assert "none of the steps" in printed
    assert steps_in(tmp_path / "damaged") == list(range(1, BAD_STEP)), "the metrics are kept"
