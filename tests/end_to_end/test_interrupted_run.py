"""A run that is killed and stopped repeatedly ends like one that was never interrupted."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from memjax.checkpoint import Checkpoints
from memjax.config.load import load
from memjax.config.run import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40

# Two devices that split bfloat16 tables, so that stochastic rounding must resume where it stopped, too.
SETTINGS = """
model: {dim: 128, num_layers: 3, num_heads: 2, ffn_dim: 24, vocab_size: 259,
        peer: {layers: [2], num_keys: 16, num_heads: 2, top_k: 4, key_dim: 8, table_dtype: bfloat16}}
data: {source: text, validation_fraction: 0.1, sequence_length: 32, batch_size: 8, packing: concat,
       tokenizer: {kind: byte}}
optim: {warmup_steps: 5, table: {warmup_steps: 5, state_columns: 64}}
mesh: {data: 1, memory: 2}
train: {steps: 40}
checkpoint: {every: 10, keep: 10}
eval: {every: 20, batches: 2}
log: {progress_seconds: 0.001, usage_every: 10}
"""
MEMORY = {"layers": [1], "num_keys": 16, "num_heads": 2, "top_k": 4, "key_dim": 8, "value_dim": 128}


class Runs:
    """Starts the train command, all runs with the same settings."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(50)]
        lines = [" ".join(rng.choice(words, size=12)) for _ in range(100)]
        (folder / "corpus.txt").write_text("\n".join(lines))
        (folder / "config.yaml").write_text(SETTINGS)
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            # Every process compiles the same programs; reading them from the cache does not change the numbers.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }

    def arguments(self, name: str) -> list[str]:
        memory = [word for key, value in MEMORY.items() for word in (f"--model.memory.{key}", json.dumps(value))]
        files = ["--data.path", str(self.folder / "corpus.txt"), "--run.dir", str(self.folder / name)]
        return [str(self.folder / "config.yaml"), *memory, "--model.memory.table_dtype", "bfloat16", *files]

    def start(self, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "memjax.train", *self.arguments(name)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, name: str) -> tuple[int, str]:
        process = self.start(name)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def stop(self, name: str, number: signal.Signals, *, at: str) -> tuple[int, str]:
        """Sends a signal after the first output line that begins with `at` (after its time stamp)."""
        with self.start(name) as process:
            assert process.stdout is not None
            output, sent = "", False
            for line in process.stdout:
                output += line
                if re.match(rf"([-\d]+ [:\d]+ +)?{re.escape(at)}", line) and not sent:
                    process.send_signal(number)
                    sent = True
        return process.returncode, output

    def rows(self, name: str) -> list[dict]:
        text = (self.folder / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self.folder / name / "checkpoints")

    def kill(self, name: str, after: int) -> None:
        """Sends kill -9 once step `after` is saved and a later step is in the metrics."""
        process = self.start(name)
        metrics = self.folder / name / "metrics.jsonl"
        while process.poll() is None:
            lines = metrics.read_text().count("\n") if metrics.exists() else 0
            if lines > after and after in self.checkpoints(name).steps():
                process.kill()
                break
            time.sleep(0.002)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"

    def config(self, name: str) -> RunConfig:
        return load(RunConfig, pathlib.Path(self.arguments(name)[0]), self.arguments(name)[1:])


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("throughput/")} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("heeding_hangups")
def test_kills_and_signals_leave_no_trace(arrays_of, tmp_path):
    runs = Runs(tmp_path)
    code, output = runs.finish("straight")
    assert code == 0, output

    runs.kill("broken", after=20)
    saved = runs.checkpoints("broken").latest()
    assert saved in (20, 30)
    assert len(runs.rows("broken")) > 20

    # Before the first step there is nothing to lose, so the run ends at once.
    code, output = runs.stop("broken", signal.SIGHUP, at="resumed from")
    assert code == 75, output
    assert "SIGHUP: the same command resumes from the latest checkpoint" in output
    for number in (signal.SIGTERM, signal.SIGINT):
        code, output = runs.stop("broken", number, at="step ")
        assert code == 75, output
        assert f"resumed from step {saved}\n" in output
        found = re.search(rf"{number.name}: step (\d+) is saved", output)
        assert found, output
        assert int(found[1]) > saved
        assert "Traceback" not in output
        saved = int(found[1])
    code, output = runs.finish("broken")
    assert code == 0, output
    assert f"resumed from step {saved}\n" in output

    rows = runs.rows("broken")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert without_times(rows) == without_times(runs.rows("straight"))
    assert len({row["train/loss"] for row in rows}) == STEPS, "every step must see another batch"
    assert rows[-1]["train/loss"] < 0.6 * rows[0]["train/loss"]

    expected, found = (arrays_of(runs.config(name), runs.checkpoints(name), STEPS) for name in ("straight", "broken"))
    assert expected.keys() == found.keys()
    different = [name for name in expected if expected[name].tobytes() != found[name].tobytes()]
    assert different == []
    assert expected["['tables']['shared']"].dtype == "bfloat16"
    places = [runs.checkpoints(name).read_document("data_iter", STEPS) for name in ("straight", "broken")]
    assert places[0] == places[1]

    code, output = runs.finish("broken")
    assert code == 0, output
    assert f"{tmp_path / 'broken'} is already finished" in output
    assert f"finished: {STEPS} steps, training loss {rows[-1]['train/loss']:.4f}" in output
