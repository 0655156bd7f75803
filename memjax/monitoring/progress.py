"""Progress: phases of a start, lines during training, bars for other long work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memjax.io.console import columns, fitted, is_live, say, show_status
from memjax.monitoring.metrics import Row
from memjax.monitoring.units import clock

_BEGAN = time.monotonic()


def log_phase(what: str) -> None:
    """Prints what the program is about to do, and the seconds since it began."""
    say(f"{_time_stamp()}{time.monotonic() - _BEGAN:7.1f} s   {what}")


def _time_stamp() -> str:
    """Date and time at the start of log lines; empty on an interactive terminal."""
    return "" if is_live() else time.strftime("%Y-%m-%d %H:%M:%S  ")


class Stopwatch:
    """Measures seconds of training; time while it is paused does not count."""

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


_BAR_COLUMNS = 20
"""Maximum width of the bar, in columns."""
BAR_SECONDS = 0.2
"""Minimum number of seconds between two states of the bar."""
_SHOWN_DATA_WAIT = 0.1
"""Progress lines mention waiting for data if a run spends at least this share of its time on it."""


class Bar:
    """The line at the bottom of a terminal: the share done, the time left, and when the work will end."""

    def __init__(self) -> None:
        self._drawn = float("-inf")

    def draw(self, share: float, text: str, left: float | None) -> None:
        """Shows a state, on a terminal and if the last one is old enough; `left` is in seconds, None if unknown."""
        now = time.monotonic()
        if not is_live() or (now - self._drawn < BAR_SECONDS and share < 1):
            return
        self._drawn = now
        line = f"{share:4.0%}  {text}"
        if left is not None:
            ends = time.strftime("%H:%M" if left < 43200 else "%d %b %H:%M", time.localtime(time.time() + left))
            line += f"  left {clock(left)}"
            line += f", until {ends}" if len(line) + len(f", until {ends}") < columns() else ""
        if (width := min(_BAR_COLUMNS, columns() - len(line) - 4)) >= 4:
            line = f"[{'#' * int(width * share):<{width}}] {line}"
        show_status(line)

    def close(self) -> None:
        show_status("")


class ProgressLines:
    """Prints a line for the first step, then one every few seconds: step, loss, rates, speed, time left.

    On a terminal, there is a bar below the lines. Speed is measured since the previous line. Time left is that of the
    steps alone, at their mean speed since the start.
    """

    def __init__(self, *, first_step: int, steps: int, every_seconds: float):
        self.steps, self.every_seconds = steps, every_seconds
        self._first, self._start = first_step, time.monotonic()
        self._last_print = self._start
        self._bar = Bar()
        self._seconds = 0.0
        self._since_print: list[Row] = []

    def show(self, row: Row) -> None:
        """Shows the row of a step; prints a line if one is due, and for the first and the last step."""
        now = time.monotonic()
        self._seconds += row["throughput/step_seconds"]
        self._since_print.append(row)
        left = self._seconds / (row["step"] - self._first) * (self.steps - row["step"])
        self._bar.draw(row["step"] / self.steps, f"step {row['step']}/{self.steps}  loss {row['train/loss']:.4f}", left)
        due = now - self._last_print >= self.every_seconds
        if not due and row["step"] not in (self._first + 1, self.steps):
            return
        self._last_print = now
        rows, self._since_print = self._since_print, []
        seconds = max(sum(row["throughput/step_seconds"] for row in rows), 1e-9)
        parts = [
            f"{_time_stamp()}step {row['step']:>{len(str(self.steps))}}/{self.steps}",
            f"{row['step'] / self.steps:4.0%}",
            f"loss {row['train/loss']:.4f}",
            f"lr {row['train/lr']:.1e}" + (f" table {row['train/lr_table']:.1e}" if "train/lr_table" in row else ""),
            f"{sum(row['train/tokens'] for row in rows) / seconds:,.0f} tokens/s",
        ]
        if row.get("train/skipped_steps"):
            parts.append(f"skipped {row['train/skipped_steps']}")
        if "throughput/mfu" in row:
            share = sum(row["throughput/mfu"] * row["throughput/step_seconds"] for row in rows) / seconds
            parts.append(f"MFU {share:.1%}")
        waited = sum(row.get("throughput/data_wait_seconds", 0.0) for row in rows) / seconds
        if waited >= _SHOWN_DATA_WAIT:
            parts.append(f"waiting for data {waited:.0%}")
        parts.append(f"elapsed {clock(now - self._start)}  left {clock(left)}")
        say(fitted("  ".join(parts)))

    def close(self) -> None:
        self._bar.close()


class Progress:
    """Shows the share done, the time left, and a text. Use it as a context manager.

    The time left does not take into account the time until the first update with something done, which is mostly
    compilation.
    """

    def __init__(self, total: int | float, every_seconds: float):
        """`total` is the final value of `update`; without a terminal, a line is printed every `every_seconds`."""
        self.total, self.every_seconds = max(1, total), every_seconds
        self._started = self._last = time.monotonic()
        self._first: tuple[float, float] | None = None
        """Time and value of the first update with something done."""
        self._bar = Bar()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the work began; always positive."""
        return max(time.monotonic() - self._started, 1e-9)

    def update(self, done: int | float, text: str) -> None:
        left = None
        if self._first is None and done:
            self._first = time.monotonic(), done
        elif self._first is not None and done > self._first[1]:
            began, done_before = self._first
            left = (time.monotonic() - began) * (self.total - done) / (done - done_before)
        self._bar.draw(done / self.total, text, left)
        if not is_live() and time.monotonic() - self._last >= self.every_seconds:
            self._last = time.monotonic()
            rest = "" if left is None else f"  left {left:.0f} s"
            say(f"{done / self.total:4.0%}  {text}  elapsed {self.elapsed:.0f} s{rest}")
