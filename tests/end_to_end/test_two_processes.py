"""Two processes, interrupted by a lost peer and by a signal, end like one process that drives both devices."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from memjax.checkpoint import Checkpoints
from memjax.config.load import load
from memjax.config.run import RunConfig

ROOT = pathlib.Path(__file__).parents[2]

SETTINGS = """
model: {dim: 16, num_layers: 1, num_heads: 2, ffn_dim: 24, vocab_size: 259, dtype: float64, param_dtype: float64}
data: {source: text, path: corpus.txt, validation_fraction: 0.1, sequence_length: 16, batch_size: 4, packing: concat,
       tokenizer: {kind: byte}}
optim: {warmup_steps: 0, schedule: constant, table: {warmup_steps: 0, schedule: constant, state_columns: 64}}
mesh: {memory: 2}
train: {steps: 1000}
checkpoint: {every: 5, keep_best: false}
eval: {every: 4, batches: 2}
log: {progress_seconds: 0.001, usage_every: 1000, tensorboard: false}
"""
MEMORY = """
--model.memory.layers 0 --model.memory.num_keys 8 --model.memory.num_heads 2 --model.memory.top_k 3
--model.memory.key_dim 8 --model.memory.value_dim 128 --model.memory.table_dtype float64
"""


class Runs:
    """Starts the train command; all runs share their settings, except for processes and steps."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        rng = np.random.default_rng(0)
        lines = ["".join(rng.choice(list("abcdefgh "), size=40)) for _ in range(60)]
        (folder / "corpus.txt").write_text("\n".join(lines))
        (folder / "config.yaml").write_text(SETTINGS)

    def start(self, name: str, *settings: str, devices: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "memjax.train", "config.yaml", *MEMORY.split(), "--run.dir", name, *settings]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_ENABLE_X64": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        self.started.append(process)
        return process

    def start_two(self, name: str, *settings: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = ["--processes.count", "2", "--processes.coordinator", f"127.0.0.1:{free.getsockname()[1]}"]
        where += ["--processes.heartbeat_timeout", "5"]
        return [self.start(name, *where, *settings, "--processes.index", str(index), devices=1) for index in range(2)]

    def rows(self, name: str) -> dict[int, dict]:
        """The metrics by step, without timings."""
        file = self.folder / name / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row["step"]: {k: v for k, v in row.items() if not k.startswith("throughput/")} for row in rows}

    def checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self.folder / name / "checkpoints")

    def config(self) -> RunConfig:
        return load(RunConfig, self.folder / "config.yaml", MEMORY.split())


@pytest.fixture
def runs(tmp_path):
    """Starts runs, and kills what is left of them after the test."""
    runs = Runs(tmp_path)
    yield runs
    for process in runs.started:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_and_a_signal_to_one_of_two_processes_leave_no_trace(arrays_of, runs):
    first, second = runs.start_two("two")
    while first.poll() is None and not (len(runs.rows("two")) > 6 and runs.checkpoints("two").latest()):
        time.sleep(0.05)
    second.kill()
    killed = time.monotonic()
    (code, _), (output, _) = ends([first, second])
    assert time.monotonic() - killed < 60
    assert code in (6, -signal.SIGABRT), output
    assert "has lost the others" in output or "another task died" in output, output
    saved = runs.checkpoints("two").latest()
    assert saved

    first, second = runs.start_two("two")
    assert first.stdout is not None
    seen = ""
    for line in first.stdout:
        seen += line
        if line.startswith("resumed from"):
            break
    second.send_signal(signal.SIGTERM)
    codes, outputs = ends([first, second])
    assert codes == [75, 75], (seen, outputs)
    assert f"resumed from step {saved}\n" in seen
    step = runs.checkpoints("two").latest()
    assert step is not None
    assert step > saved
    assert f"another process was interrupted: step {step} is saved" in outputs[0]
    assert not outputs[1].count("\nstep "), "only the first process reports"

    code, output = ends([runs.start("one", "--train.steps", str(step), devices=2)])
    assert code == [0], output
    one, two = runs.rows("one"), runs.rows("two")
    assert list(two) == list(range(1, step + 1))
    # Both validate every four steps; the last step of a run also validates, and reports slot usage.
    extra = lambda row: {
        name: value for name, value in row.items() if not name.startswith(("eval/", "memory/", "slots/"))
    }
    assert [extra(row) for row in two.values()] == [extra(row) for row in one.values()]
    assert all(two[step] == one[step] for step in one if step != max(one))
    with jax.enable_x64(True):
        expected, found = (arrays_of(runs.config(), runs.checkpoints(name), step) for name in ("one", "two"))
    different = [name for name in expected if "reads" not in name and expected[name].tobytes() != found[name].tobytes()]
    assert different == []
    assert expected.keys() == found.keys()
    assert expected["['tables']['shared']"].dtype == "float64"
    places = [runs.checkpoints(name).read_document("data_iter", step) for name in ("one", "two")]
    assert places[0] == places[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_share_a_tensor_axis(runs):
    # Two memory layers: the reductions in their loops over picks were once out of order with those of dense blocks.
    blocks = ["--model.num_layers", "2", "--model.memory.layers", "0,1", "--model.vocab_size", "260"]
    settings = [*blocks, "--mesh.memory", "1", "--mesh.tensor", "2", "--train.steps", "6"]
    codes, outputs = ends(runs.start_two("two", *settings))
    assert codes == [0, 0], outputs
    codes, outputs = ends([runs.start("one", *settings, devices=2)])
    assert codes == [0], outputs
    one, two = ([row["train/loss"] for row in runs.rows(name).values()] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-12)
    assert len(two) == 6
