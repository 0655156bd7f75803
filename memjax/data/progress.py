"""How far a long work is: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any, TypeVar

import rich.progress

P = TypeVar("P", bound="Progress")


class Progress:
    """Shows the share that is done, the time left, and what there is to say of it. Use it in a `with`."""

    def __init__(self, total: int | float, every_seconds: float):
        """Takes what `update` counts up to, and the time between two lines where there is no terminal."""
        self.total, self.every_seconds = max(1, total), every_seconds
        self._started = self._last = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TextColumn("elapsed"),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("left"),
                rich.progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=self.total)

    def __enter__(self: P) -> P:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the work began; never zero."""
        return max(time.monotonic() - self._started, 1e-9)

    def update(self, done: int | float, text: str) -> None:
        """Takes how far it is."""
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif time.monotonic() - self._last >= self.every_seconds:
            self._last = time.monotonic()
            left = f"  left {self.elapsed * (self.total - done) / done:.0f} s" if done else ""
            print(f"{done / self.total:4.0%}  {text}  elapsed {self.elapsed:.0f} s{left}", flush=True)


class ByteProgress(Progress):
    """How far the bytes of some files are read."""

    def show(self, num_bytes: int, records: int, tokens: int) -> None:
        """Takes how far it is."""
        self.update(num_bytes, f"{records:,} records  {tokens:,} tokens  {tokens / self.elapsed:,.0f} tokens/s")
