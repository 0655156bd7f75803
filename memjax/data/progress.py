"""How far a long reading of files is: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

import rich.progress


class ByteProgress:
    """Shows the share of the bytes that are done with, the time left, and what was found. Use it in a `with`."""

    def __init__(self, total_bytes: int, every_seconds: float):
        self.total_bytes, self.every_seconds = max(1, total_bytes), every_seconds
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
            self._task = self._bar.add_task("", total=self.total_bytes)

    def __enter__(self) -> "ByteProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, num_bytes: int, records: int, tokens: int) -> None:
        """Takes how far it is."""
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        found = f"{records:,} records  {tokens:,} tokens  {tokens / elapsed:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=num_bytes, description=found)
        elif now - self._last >= self.every_seconds:
            self._last = now
            left = elapsed / max(1, num_bytes) * (self.total_bytes - num_bytes)
            print(
                f"{num_bytes / self.total_bytes:4.0%}  {found}  elapsed {elapsed:.0f} s  left {left:.0f} s", flush=True
            )
