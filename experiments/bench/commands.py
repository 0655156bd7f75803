"""Runs the real commands as processes for benchmarks: a corpus, starting and stopping, and reading what they wrote."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cases

Row = dict[str, Any]


class Failed(Exception):
    """A command did not do what it should."""


def write_corpus(file: pathlib.Path, documents: int) -> None:
    """Writes texts with a small vocabulary, so that the loss falls within tens of steps."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(200)]
    lines = (json.dumps({"text": " ".join(draw.choices(words, k=500))}) for _ in range(documents))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


class Command:
    """`python -m memjax.NAME ARGUMENTS` as a process, with its output in a file."""

    def __init__(self, name: str, arguments: Sequence[str], log: pathlib.Path, **environment: str):
        self.log, self.started = log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        path = f"{cases.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        words = [sys.executable, "-m", f"memjax.{name}", *arguments]
        print("$", " ".join(words), file=sys.stderr, flush=True)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                words, env=os.environ | {"PYTHONPATH": path} | environment, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        """Its output so far."""
        return self.log.read_text()

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.started

    def end(self, seconds: float) -> int:
        """Waits for its exit code.

        Raises:
            Failed: it did not end within `seconds`, and was killed.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"no end after {seconds:.0f} s: {self.tail()}") from None
        finally:
            self.kill()

    def until(self, seen: Callable[[], bool], seconds: float) -> None:
        """Waits until `seen` returns true.

        Raises:
            Failed: the command ended before, or `seconds` have passed.
        """
        limit = time.monotonic() + seconds
        while not seen():
            if self.process.poll() is not None:
                raise Failed(f"ended with exit code {self.process.returncode}: {self.tail()}")
            if time.monotonic() > limit:
                raise Failed(f"not seen in {seconds:.0f} s: {self.tail()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kills it, unless it has ended."""
        self.process.kill()
        self.process.wait()

    def tail(self) -> str:
        """The end of its output as one line."""
        return " ".join(self.output.split())[-400:]


def metrics(run: pathlib.Path) -> list[Row]:
    """The metrics rows that a run has written so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: pathlib.Path) -> int:
    """The last step in a run's metrics; 0 without any."""
    return max((row["step"] for row in metrics(run)), default=0)


def saved_step(run: pathlib.Path) -> int:
    """The step of the checkpoint from which a run would resume; 0 without one."""
    from memjax.checkpoint import Checkpoints

    folder = run / "checkpoints"
    return (Checkpoints(folder).latest() if folder.exists() else None) or 0
