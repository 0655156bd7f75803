"""A tiny run, the processes that train it, and checks of how they end."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 12
EVERY = 3
"""Steps between checkpoints."""
QUICKLY = 10.0
"""Seconds within which a process must end; longer counts as a hang."""

CONFIG = f"""
model:
  dim: 16
  num_layers: 2
  num_heads: 2
  ffn_dim: 16
  vocab_size: 259
  memory: {{layers: [1], num_keys: 8, num_heads: 1, top_k: 2, key_dim: 4, value_dim: 16}}
data:
  source: text
  path: corpus.txt
  validation_fraction: 0.1
  sequence_length: 16
  batch_size: 4
  packing: concat
  num_workers: 0
  tokenizer: {{kind: byte}}
optim: {{warmup_steps: 2, table: {{warmup_steps: 2}}}}
train: {{steps: {STEPS}}}
checkpoint: {{every: {EVERY}, keep: 100}}
eval: {{every: 6, batches: 1}}
log: {{progress_seconds: 0.001, usage_every: 6, tensorboard: false}}
"""


class Skipped(Exception):
    """A case that cannot be tried on this machine; the message says why."""


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    code: int
    output: str
    seconds: float
    """Without the time spent waiting for a core on a busy machine."""
    hung: bool


@dataclasses.dataclass
class Case:
    """One attempt, which records its faults while it runs."""

    campaign: str
    name: str
    attempt: Callable[["Case"], None]
    seed: int
    tried: int = 1
    lost: int = 0
    wrong: int = 0
    hung: int = 0
    tracebacks: int = 0
    other: int = 0
    skipped: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        """Number of all faults."""
        return self.lost + self.wrong + self.hung + self.tracebacks + self.other

    @property
    def random(self) -> random.Random:
        """A generator that depends only on campaign, name and seed."""
        return random.Random(f"{self.campaign} {self.name} {self.seed}")

    def note(self, kind: str, text: str) -> None:
        """Counts a fault and keeps its description."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.notes.append(f"{kind}: {text[-2000:]}")

    def check(self, ended: Ended, codes: Sequence[int], what: str) -> bool:
        """Whether a process ended in time, without a traceback and with one of the codes; records a fault otherwise."""
        before = self.faults
        if ended.hung:
            self.note("hung", f"{what}: still there\n{ended.output}")
        elif ended.code not in codes:
            self.note("other", f"{what}: exit code {ended.code}, not one of {list(codes)}\n{ended.output}")
        if "Traceback (most recent call last)" in ended.output:
            self.note("tracebacks", f"{what}:\n{ended.output}")
        return self.faults == before


class Lab:
    """The folder of all attempts, with a run that was never disturbed."""

    def __init__(self, folder: pathlib.Path, patience: float, workers: int) -> None:
        self.folder, self.patience, self.workers = folder, patience, workers
        self.folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        words = ["alpha", "beta", "gamma", "delta", "epsilon"]
        lines = [" ".join(rng.choices(words, k=9)) for _ in range(200)]
        (folder / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
            "MEMJAX_COMPILE_CACHE": str(folder / "compiled"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.seconds = 0.0
        self.repeats = True
        """Whether two undisturbed runs are equal; if not, as can happen on GPUs, values are not compared."""
        self._stopped = False
        self._running: set[int] = set()
        self._guard = threading.Lock()

    def prepare(self) -> None:
        """Makes the undisturbed run twice; the second start uses programs compiled by the first."""
        for name in ("first", "reference"):
            ended = self.train(self.folder / name)
            if ended.code != 0:
                raise SystemExit(f"the undisturbed run ends with {ended.code}:\n{ended.output}")
        self.seconds = ended.seconds
        self.rows, self.digests = self.result(self.folder / "reference")
        rows, digests = self.result(self.folder / "first")
        self.repeats = (rows, digests) == (self.rows, self.digests)

    def copy(self, target: pathlib.Path, *, steps: int = STEPS) -> pathlib.Path:
        """A copy of the undisturbed run, as if it had been killed after `steps` steps."""
        shutil.copytree(self.folder / "reference", target)
        if steps < STEPS:
            (target / "summary.json").unlink()
            for step in range(steps + 1, STEPS + 1):
                shutil.rmtree(target / "checkpoints" / str(step), ignore_errors=True)
            lines = (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (target / "metrics.jsonl").write_text("".join(lines[:steps]), encoding="utf-8")
        return target

    def command(self, run: pathlib.Path, *more: str) -> list[str]:
        """The command line that trains the run."""
        workers = ["--data.num_workers", str(self.workers)] if self.workers else []
        return [
            *(sys.executable, "-m", "memjax.train", str(self.folder / "config.yaml")),
            *("--data.path", str(self.folder / "corpus.txt"), "--run.dir", str(run), *workers, *more),
        ]

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a process in its own session."""
        if self._stopped:
            raise Skipped("interrupted")
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            **options,
        )
        with self._guard:
            self._running.add(process.pid)
        return process

    def end(self, process: subprocess.Popen[str], seconds: float | None = None, read: str = "") -> Ended:
        """Waits for a process, which is killed with its group if it does not end in time."""
        limit = self.patience if seconds is None else seconds
        started, begin, waited, hung = time.monotonic(), _waits(process.pid), 0.0, False
        while True:
            try:
                rest, _ = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                now = _waits(process.pid)
                waited = max([waited, *(now[thread] - begin.get(thread, 0.0) for thread in now)])
                if not hung and time.monotonic() - started - waited > limit:
                    hung = True
                    self._kill(process.pid)
        self._kill(process.pid)
        with self._guard:
            self._running.discard(process.pid)
        return Ended(process.returncode, read + rest, time.monotonic() - started - waited, hung)

    def train(self, run: pathlib.Path, *more: str, **options: Any) -> Ended:
        """Runs the training to its end."""
        return self.end(self.start(self.command(run, *more), **options))

    def stop(self) -> None:
        """Kills all running processes, and prevents new ones."""
        self._stopped = True
        for pid in list(self._running):
            self._kill(pid)

    @staticmethod
    def _kill(group: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)

    @staticmethod
    def steps(run: pathlib.Path) -> list[int]:
        """The checkpoints on disk."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
        return []

    @staticmethod
    def result(run: pathlib.Path) -> tuple[list[dict[str, Any]], Any]:
        """The metrics rows without times, and the digests of all arrays of the last step."""
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [{name: value for name, value in row.items() if not name.startswith("throughput/")} for row in rows]
        stored = json.loads((run / "checkpoints" / str(STEPS) / "digests" / "metadata").read_text(encoding="utf-8"))
        return rows, stored["index"]["arrays"]

    def finish(self, case: Case, run: pathlib.Path, what: str) -> None:
        """Runs the same command again, and compares the finished run with the undisturbed one."""
        had = self.steps(run)
        ended = self.train(run)
        if case.check(ended, [0], f"{what}, then the same command"):
            self.check_resumed(case, had, ended, what)
            self.compare(case, run, what)

    @staticmethod
    def check_resumed(case: Case, had: list[int], ended: Ended, what: str) -> None:
        """Records a fault if a start resumed from an older step than the newest saved one."""
        resumed = [line for line in ended.output.splitlines() if line.startswith("resumed from step ")]
        went_on = int(resumed[0].split()[-1]) if resumed else STEPS if "is already finished" in ended.output else 0
        if had and went_on < had[-1]:
            case.note("lost", f"{what}: step {had[-1]} was saved, the run went on from {went_on}\n{ended.output}")

    def compare(self, case: Case, run: pathlib.Path, what: str) -> None:
        """Records how a finished run differs from the undisturbed one."""
        try:
            rows, digests = self.result(run)
        except (OSError, ValueError, KeyError) as error:
            case.note("lost", f"{what}: {type(error).__name__}: {error}")
            return
        if [row["step"] for row in rows] != [row["step"] for row in self.rows]:
            case.note("lost", f"{what}: rows of steps {[row['step'] for row in rows]}")
        elif self.repeats and rows != self.rows:
            differ = next(row["step"] for row, other in zip(rows, self.rows, strict=True) if row != other)
            case.note("wrong", f"{what}: metrics differ from step {differ} on")
        elif self.repeats and digests != self.digests:
            case.note("wrong", f"{what}: arrays of the last step differ")
        if left := [path.name for path in (run / "checkpoints").glob("*tmp*")]:
            case.note("other", f"{what}: {left} left behind")


def _waits(pid: int) -> dict[str, float]:
    """Seconds that each thread of a process was runnable but had no core (Linux only)."""
    waits = {}
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            waits[path.parent.name] = int(path.read_text(encoding="utf-8").split()[1]) / 1e9
    return waits
