"""Sweeps over a grid of settings: one run per combination, each in its own process.

Does not import JAX: each run starts it with its own devices.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.errors import ConfigError
from memjax.io.console import say
from memjax.io.files import read_object
from memjax.monitoring.units import clock
from memjax.training.interrupt import SAVED, SIGNALS

_POLL_SECONDS = 0.1

_VALUE = r"(?:\[[^]\[]*\]|\{[^{}]*\}|[^,\[\]{}])+"
"""One value of a list, in which commas inside brackets do not separate."""

_MEANINGS = {0: "done", 2: "wrong settings", 3: "unusable data", 4: "files", 5: "not a number", 7: "out of memory"}


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of the grid."""

    name: str
    """Name of its folder, such as lr=0.001,num_keys=64."""
    arguments: tuple[str, ...]
    """The settings as command-line arguments."""


@dataclasses.dataclass
class _Started:
    point: Point
    process: subprocess.Popen[bytes]
    began: float
    slot: int


def parse_grid(specifications: Sequence[str]) -> dict[str, list[str]]:
    """The values of each setting, from words such as `optim.lr=1e-3,3e-3`; commas inside brackets do not separate.

    Raises:
        ConfigError: a word is not of that form, or names a setting twice.
    """
    grid: dict[str, list[str]] = {}
    problems = []
    for word in specifications:
        setting, equals, text = word.removeprefix("--").partition("=")
        values = [value.strip() for value in re.findall(_VALUE, text)]
        is_whole = re.fullmatch(rf"{_VALUE}(,{_VALUE})*", text)
        if not (setting and equals and all(values) and is_whole):
            problems.append(f"grid={word} must be SETTING=VALUE,VALUE,... such as optim.lr=1e-3,3e-3")
        elif setting in grid:
            problems.append(f"grid={word} gives values for {setting} a second time; put all of them into one --grid")
        elif len(set(values)) < len(values):
            problems.append(f"grid={word} repeats a value; each value is one run")
        elif setting in ("run.dir", "run.mirror"):
            problems.append(f"grid={word}: the sweep names the folders of its runs itself")
        else:
            grid[setting] = values
    if not grid and not problems:
        problems.append("grid is missing: give --grid SETTING=VALUE,VALUE,... once for each setting that varies")
    if problems:
        raise ConfigError(problems)
    return grid


def points(grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """All combinations; a setting is named by its last word, unless another one ends with the same word."""
    ends = collections.Counter(setting.rpartition(".")[2] for setting in grid)
    short = {setting: end if ends[end := setting.rpartition(".")[2]] == 1 else setting for setting in grid}
    found = []
    for values in itertools.product(*grid.values()):
        pairs = dict(zip(grid, values, strict=True))
        name = ",".join(f"{short[setting]}={_plain(value)}" for setting, value in pairs.items())
        words = itertools.chain.from_iterable((f"--{setting}", value) for setting, value in pairs.items())
        if len(name.encode()) > 240:  # with a number and ".log", more than file systems allow
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            name = f"{name.encode()[:200].decode(errors='ignore')}-{digest}"
        found.append(Point(name, tuple(words)))
    counts = collections.Counter(point.name for point in found)
    numbers = {name: itertools.count(1) for name in counts}
    for place, point in enumerate(found):
        if counts[point.name] > 1:  # values that differ only in characters that folder names cannot contain
            numbered = (f"{point.name}-{number}" for number in numbers[point.name])
            found[place] = dataclasses.replace(point, name=next(name for name in numbered if name not in counts))
    return found


def _plain(value: str) -> str:
    """The value as part of a folder's name."""
    return re.sub(r"[^\w.+-]", "_", value)


def unfinished(
    config: pathlib.Path | None, settings: Sequence[str], folder: pathlib.Path, grid: Sequence[Point]
) -> list[Point]:
    """The combinations that still have to be trained. All are checked before the first one starts.

    Raises:
        ConfigError: with the problems of all combinations, each once.
    """
    found, problems = [], dict[str, None]()
    for point in grid:
        try:
            settled = load(RunConfig, config, [*settings, *point.arguments, "--run.dir", str(folder / point.name)])
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
        else:
            found += [point] * (not _is_finished(settled))
    if problems:
        raise ConfigError(list(problems))
    return found


def _is_finished(config: RunConfig) -> bool:
    """Whether the run made all of its steps with these settings; one with a mirror may still have something to send."""
    run = pathlib.Path(config.run.dir)
    summary = read_object(run / "summary.json") or {}
    if config.run.mirror is not None or summary.get("steps") != config.train.steps:
        return False
    try:
        return load(RunConfig, run / "config.yaml") == config
    except ConfigError:
        return False  # the run itself will report what is wrong


class Sweep:
    """Starts the runs, `jobs` at a time, reports each, and forwards signals to them."""

    def __init__(
        self,
        command: Sequence[str],
        folder: pathlib.Path,
        grid: Sequence[Point],
        *,
        jobs: int,
        mirror: str | None = None,
    ) -> None:
        """Takes the command of a run without the settings that vary; each run's output goes to FOLDER/NAME.log.

        The mirror of each run is MIRROR/NAME.
        """
        self.command, self.folder, self.grid, self.jobs = tuple(command), folder, grid, jobs
        self.mirror = mirror
        self.running: list[_Started] = []
        self.codes: dict[str, int] = {}
        self.stopped: int | None = None

    def run(self) -> int:
        """Returns the exit code: 0 if all runs are done, 75 after a signal, else that of the first run that failed."""
        # Ignored signals stay ignored, such as SIGHUP under nohup.
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._forward) for number in caught}
        waiting = collections.deque(self.grid)
        try:
            while self.running or (waiting and self.stopped is None):
                while waiting and len(self.running) < self.jobs and self.stopped is None:
                    self._start(waiting.popleft())
                time.sleep(_POLL_SECONDS)
                self._collect()
        finally:
            for started in self.running:
                started.process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stopped is not None:
            say(f"{signal.Signals(self.stopped).name}: stopped; the same command resumes")
            return SAVED
        return next((code for code in self.codes.values() if code), 0)

    def _start(self, point: Point) -> None:
        slot = min(set(range(self.jobs)) - {started.slot for started in self.running})
        log = self.folder / f"{point.name}.log"
        places = ["--run.dir", str(self.folder / point.name)]
        if self.mirror is not None:
            places += ["--run.mirror", f"{self.mirror.rstrip('/')}/{point.name}"]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.command, *point.arguments, *places],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _devices(slot, self.jobs),
                start_new_session=True,  # only the sweep gets a Ctrl-C, and forwards it once
            )
        self.running.append(_Started(point, process, time.monotonic(), slot))
        if self.stopped is not None:  # the signal arrived while the process was being started
            process.send_signal(self.stopped)
        say(f"[{len(self.codes) + len(self.running)}/{len(self.grid)}] {point.name}: started, output in {log}")

    def _collect(self) -> None:
        for started in [started for started in self.running if started.process.poll() is not None]:
            self.running.remove(started)
            code = started.process.returncode
            self.codes[started.point.name] = code
            outcome = _MEANINGS.get(code, "stopped" if code == SAVED else "failed")
            took = clock(time.monotonic() - started.began)
            say(f"{started.point.name}: {outcome} after {took}" + (f" (exit code {code})" if code else ""))

    def _forward(self, number: int, frame: object) -> None:
        self.stopped = number
        for started in self.running:
            started.process.send_signal(number)


def _devices(slot: int, jobs: int) -> dict[str, str]:
    """The GPUs of a run, if several runs share a machine whose GPUs are listed in CUDA_VISIBLE_DEVICES."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if jobs == 1 or not visible:
        return {}
    share = [name for place, name in enumerate(visible) if place % jobs == slot] or [visible[slot % len(visible)]]
    return {"CUDA_VISIBLE_DEVICES": ",".join(share)}
