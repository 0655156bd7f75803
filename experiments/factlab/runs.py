"""Runs many trainings concurrently on one or several devices, within a time limit; writes each result to disk.

Small models leave a GPU idle while they compile and start, so several processes share it. A failed run is reported, and
the others continue; a run that cannot end in time is left for the next call.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from memjax.io.files import write_atomic

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A run of a pool; all its fields are sent to the worker as its task."""

    stage: str
    config: str
    """Path of its YAML."""
    exposures: float = 0.0
    """How often it reads its training data."""
    seed: int = 0
    settings: tuple[str, ...] = ()
    seconds: float = 60.0
    """Estimated time of the first run of its kind, scaled by how much other kinds deviated from their estimates; later
    runs use the measured time."""
    alone: bool = False
    """Whether it needs a GPU to itself."""

    @property
    def name(self) -> str:
        """A unique name; runs whose name is in the results are not run again."""
        raise NotImplementedError

    @property
    def kind(self) -> tuple[Any, ...]:
        """Runs of one kind share their compiled programs, and take about the same time."""
        raise NotImplementedError

    def row(self) -> Result:
        """Its description in the results, without measures."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyTraining(Training):
    """A training run of a model family at given learning rates."""

    family: str
    lr: float
    table_lr: float

    @property
    def changes(self) -> tuple[str, ...]:
        """Settings that differ from the family's."""
        return self.settings

    def named(self, *what: str, marks: Sequence[str] = ()) -> str:
        """A name from stage, family, training data, rates, seed, marks and changes."""
        words = [self.stage, self.family, *what, f"x{self.exposures:g}", f"lr{self.lr:g}"]
        words += [f"table{self.table_lr:g}"] if self.table_lr else []
        changes = zip(*[iter(self.changes)] * 2, strict=True)
        changed = [f"{name.removeprefix('--')}={value}" for name, value in changes]
        return " ".join([*words, f"seed{self.seed}", *marks, *changed])

    def row(self) -> Result:
        """Name, changes, family, rates and seed."""
        fields = ("stage", "family", "lr", "table_lr", "seed")
        return {"name": self.name, "settings": list(self.changes), **{name: getattr(self, name) for name in fields}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(FamilyTraining):
    """A training run on facts."""

    facts: dict[str, Any]
    perfect_address: bool = False
    without: str = ""
    """Projection removed from the memory layers: gate_proj or value_proj."""
    measure: str = ""
    """Additional measure of the trained model: guessing (see guessing.py)."""

    @property
    def name(self) -> str:
        """The name, including its facts and differences from the family's model."""
        facts = "-".join(f"{name}{value}" for name, value in self.facts.items() if name != "file")
        marks = ["perfect"] * self.perfect_address + [f"without={self.without}"] * bool(self.without)
        return self.named(facts, marks=marks)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Everything that a compiled program depends on."""
        return self.config, self.settings, self.perfect_address, self.without, tuple(self.facts.items())

    def row(self) -> Result:
        """The description, including differences from the family's model."""
        row = super().row() | {"perfect_address": self.perfect_address}
        return row | ({"without": self.without} if self.without else {})


def read_results(*paths: pathlib.Path) -> dict[str, Result]:
    """The results in the given files, by name of the run; earlier files take precedence."""
    found: dict[str, Result] = {}
    for path in paths:
        for row in json.loads(path.read_text())["runs"] if path.exists() else ():
            found.setdefault(row["name"], row)
    return found


def write_results(path: pathlib.Path, results: dict[str, Result]) -> None:
    """Writes all results to one file, atomically."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in results.values())
    write_atomic(path, f'{{"runs": [\n{lines}\n]}}\n')


def recall_and_bits(result: Result) -> str:
    """Summary of a finished training on facts, for its progress line."""
    return f"recall {result['recall']:.4f}, {result['stored_bits'] / 1e3:.0f} kbit"


class Pool:
    """Runs tasks in several processes until all are done or time is up."""

    def __init__(
        self,
        path: pathlib.Path,
        results: dict[str, Result],
        *,
        jobs: int,
        gpus: int = 1,
        deadline: float | None,
        module: str = "factlab.worker",
        paths: Sequence[pathlib.Path] = (),
        describe: Callable[[Result], str] = recall_and_bits,
        keeps_order: bool = False,
    ):
        """Results are added to `results` and written to `path`; `deadline` is a `time.time()`.

        With several GPUs, each process sees one of them.

        Args:
            path: file of the results.
            results: existing results, by name.
            jobs: number of processes.
            gpus: GPUs over which the processes are spread.
            deadline: no run is started that would end later.
            module: the module that a process runs.
            paths: additional folders in which Python looks for it.
            describe: summarises a finished run's result for its progress line.
            keeps_order: start runs in the given order, regardless of which programs a process has compiled.
        """
        self.path, self.results, self.jobs, self.deadline = path, results, jobs, deadline
        self._command, self._describe, self._keeps_order = (module, *map(str, paths)), describe, keeps_order
        if not 1 <= gpus <= jobs:
            raise SystemExit(f"--gpus {gpus}: must be between 1 and --jobs {jobs}")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        if len(visible) < gpus:
            raise SystemExit(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES={','.join(visible)} shows only {len(visible)}")
        # With the platform named, a missing GPU is an error instead of a fallback to the CPU.
        given = lambda name: {"CUDA_VISIBLE_DEVICES": name, "JAX_PLATFORMS": "cuda,cpu"}
        self._environments = [given(name) if gpus > 1 else {} for name in visible[:gpus]]
        self._lock = threading.Lock()
        self._seconds: dict[Any, float] = {}
        self._slowdowns: list[float] = []
        """Ratios of measured to estimated time, used to correct the estimates of other kinds."""
        self._running: dict[str, tuple[Training, int]] = {}
        self._began = time.time()

    def run(self, runs: Sequence[Training]) -> list[str]:
        """Runs everything without a result; returns the names of runs that still have none."""
        self._left = [run for run in runs if run.name not in self.results]
        self._total, self._failed = len(self._left), []
        already = len(runs) - self._total
        print(f"{self._total} runs to do, {already} done before, {self.jobs} at once", flush=True)
        threads = [threading.Thread(target=self._serve, args=(number,)) for number in range(self.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self._failed + [run.name for run in self._left]

    def _serve(self, number: int) -> None:
        """Feeds runs to one process, which is replaced if it dies."""
        environment = self._environments[number % len(self._environments)]
        worker, compiled, failures = Worker(environment, *self._command), set(), 0
        while failures < 3 and (run := self._next(compiled, number % len(self._environments))) is not None:
            if not worker.is_alive():
                worker.stop()
                worker, compiled = Worker(environment, *self._command), set()
            compiled.add(run.kind)
            started = time.time()
            answer = worker.ask({**dataclasses.asdict(run), "name": run.name, "deadline": self.deadline})
            self._note(run, answer, time.time() - started, number)
            failures = 0 if "result" in answer else failures + 1
        if failures:
            print(f"process {number} ended after {failures} failures in a row", flush=True)
        worker.stop()

    def _next(self, compiled: set[Any], gpu: int) -> Training | None:
        """The next run for a process, once its GPU has room; None if none is left that can end in time."""
        while True:
            with self._lock:
                in_time = [run for run in self._left if self.deadline is None or self._ends(run) <= self.deadline]
                if not in_time:
                    return None
                best = self._best(in_time, compiled)
                others = [run for run, where in self._running.values() if where == gpu]
                if not others or not (best.alone or any(run.alone for run in others)):
                    self._left.remove(best)
                    self._running[best.name] = best, gpu
                    return best
            time.sleep(0.5)

    def _best(self, in_time: Sequence[Training], compiled: set[Any]) -> Training:
        """The first run if order is kept; else preferably a kind already compiled, then one that no process runs."""
        if self._keeps_order:
            return in_time[0]
        order = {run.name: place for place, run in enumerate(in_time)}
        busy = [run.kind for run, _ in self._running.values()]
        return min(in_time, key=lambda run: (run.seed, run.kind not in compiled, run.kind in busy, order[run.name]))

    def _ends(self, run: Training) -> float:
        guess = run.seconds * statistics.median(self._slowdowns or [1.0])
        return time.time() + self._seconds.get((run.kind, run.exposures), guess)

    def _note(self, run: Training, answer: dict[str, Any], seconds: float, number: int) -> None:
        """Stores a result, or reports the failure."""
        with self._lock:
            del self._running[run.name]
            if "result" not in answer:
                self._failed.append(run.name)
                print(f"FAILED [{run.name}] {answer}", flush=True)
                return
            self._seconds[run.kind, run.exposures] = seconds
            result = {**run.row(), **answer["result"], "wall_seconds": round(seconds, 1)}
            self.results[run.name] = result
            write_results(self.path, self.results)
            self._slowdowns.append(seconds / max(run.seconds, 1e-9))
            done = self._total - len(self._left) - len(self._running) - len(self._failed)
            elapsed = time.time() - self._began
            print(
                f"{done}/{self._total} in {elapsed:.0f} s, about {elapsed / done * (self._total - done):.0f} s left: "
                f"[{run.name}] {self._describe(result)}, "
                f"{result['tokens_per_second'] / 1e6:.2f} M tokens/s, {seconds:.0f} s "
                f"(compiling {result['compile_seconds']:.0f}), process {number}",
                flush=True,
            )


class Worker:
    """A worker process, started with its first task."""

    def __init__(self, environment: dict[str, str], module: str, *paths: str) -> None:
        self._environment, self._command = environment, (module, *paths)
        self._process: subprocess.Popen[str] | None = None

    def is_alive(self) -> bool:
        """Whether it can take a task."""
        return self._process is None or self._process.poll() is None

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Sends a task, and returns the answer: `result`, `late` or `error`."""
        self._process = self._process or start(self._environment, *self._command)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(task), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError as error:
            return {"error": f"the worker cannot be asked: {error}"}
        return json.loads(line) if line else {"error": f"the worker ended with {self._process.wait()}"}

    def stop(self) -> None:
        """Lets the process end, and waits for it."""
        if self._process is not None:
            # Closes its input, upon which it ends, and discards remaining output.
            self._process.communicate()


def start(environment: dict[str, str], module: str, *paths: str) -> subprocess.Popen[str]:
    """Starts a process that allocates device memory on demand and shares compiled programs with the others.

    `environment` holds variables that are added to those of this process.
    """
    every = [*paths, str(HERE.parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(every)} | environment
    for name, value in {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(tempfile.gettempdir()) / "factlab_programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        "OMP_NUM_THREADS": "1",
    }.items():
        environment.setdefault(name, value)
    command = [sys.executable, "-m", module]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
