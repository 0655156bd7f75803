"""What a run tells while it goes on: one line of JSON a step, a progress line now and then, plots at the end."""

import json
import math
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

Row = dict[str, Any]

_BEGAN = time.monotonic()

# Dense bf16 peak of one device in FLOP/s, from the makers' data sheets. A device that is not here has no MFU.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak of a device in FLOP/s (dense bf16); None where it is not known."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


def tell_phase(what: str) -> None:
    """Prints what a start is about to do, and when: seconds since the program began."""
    print(f"{time.monotonic() - _BEGAN:7.1f} s   {what}", flush=True)


class MetricsFile:
    """`metrics.jsonl`: exactly one line for every step."""

    def __init__(self, path: pathlib.Path, *, last_step: int):
        """Opens the file to append; lines after last_step, which will be made again, are cut off first."""
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, row: Row) -> None:
        """Appends a line; values that are not finite become null, which JSON can hold."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")

    def flush(self) -> None:
        """Hands the lines to the operating system, so that a killed process loses none."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: pathlib.Path) -> list[Row]:
    """The rows of a metrics file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Stopwatch:
    """Seconds of training: what happens while it is paused does not count."""

    def __init__(self) -> None:
        self._mark = time.monotonic()
        self._paused = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops it while the block runs; blocks do not nest."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = time.monotonic()
        seconds = now - self._mark - self._paused
        self._mark, self._paused = now, 0.0
        return seconds


class Progress:
    """Prints a line every few seconds: step, loss, rates, speed, time left.

    Speed is that since the line before. Time left is that of the steps alone, at their mean speed since the start.
    """

    def __init__(self, *, first_step: int, steps: int, every_seconds: float):
        self.steps, self.every_seconds = steps, every_seconds
        self._first, self._start = first_step, time.monotonic()
        self._last_print = self._start
        self._seconds = 0.0
        self._since_print: list[Row] = []

    def show(self, row: Row) -> None:
        """Takes a step's row; prints when it is time, and at the last step."""
        now = time.monotonic()
        self._seconds += row["throughput/step_seconds"]
        self._since_print.append(row)
        if row["step"] < self.steps and now - self._last_print < self.every_seconds:
            return
        self._last_print = now
        rows, self._since_print = self._since_print, []
        seconds = max(sum(row["throughput/step_seconds"] for row in rows), 1e-9)
        left = self._seconds / (row["step"] - self._first) * (self.steps - row["step"])
        parts = [
            f"step {row['step']:>{len(str(self.steps))}}/{self.steps}",
            f"{row['step'] / self.steps:4.0%}",
            f"loss {row['train/loss']:.4f}",
            f"lr {row['train/lr']:.1e}" + (f" table {row['train/lr_table']:.1e}" if "train/lr_table" in row else ""),
            f"{sum(row['train/tokens'] for row in rows) / seconds:,.0f} tokens/s",
        ]
        if "throughput/mfu" in row:
            share = sum(row["throughput/mfu"] * row["throughput/step_seconds"] for row in rows) / seconds
            parts.append(f"MFU {share:.1%}")
        parts.append(f"elapsed {clock(now - self._start)}  left {clock(left)}")
        print("  ".join(parts), flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
