"""`metrics.jsonl`: one line of JSON for every step of a run."""

import contextlib
import errno
import io
import json
import math
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from memjax.io.console import warn
from memjax.io.files import read_document, write_atomic

Row = dict[str, Any]

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets. For other devices, no MFU is reported.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak of a device in FLOP/s (dense bf16); None if unknown."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


class MetricsFile:
    """`metrics.jsonl`: exactly one line for every step.

    Lines that cannot be written stay in memory and are tried again with the next ones, so that nothing is lost if a
    disk is full for a while.
    """

    def __init__(self, path: pathlib.Path, *, last_step: int):
        """Opens the file for appending. Removes damaged lines and those after last_step, whose steps will be repeated.

        Raises:
            OSError: the file cannot be read or replaced.
        """
        self.path = path
        self._waiting: list[str] = []
        self._written = 0
        """Size of the file in bytes, up to the last complete line."""
        self._warned = False
        # Lines are kept as they are, since a long run has a million of them.
        lines = {row["step"]: line for row, line in _rows(path) if row["step"] <= last_step}
        write_atomic(path, b"".join(lines[step] + b"\n" for step in sorted(lines)))
        self._file: io.FileIO | None = None
        self._open()

    def write(self, row: Row) -> None:
        """Queues a row; values that are not finite become null, since JSON has no others."""
        self._waiting.append(_line(row))

    def amend(self, step: int, more: Row) -> None:
        """Adds metrics to the row of a step that is already in the file."""
        self.flush()
        rows = [row | more if row["step"] == step else row for row in read_metrics(self.path)]
        try:
            write_atomic(self.path, "".join(_line(row) for row in rows))
            self._open()
        except OSError as error:
            self._warn(error)

    def flush(self) -> None:
        """Passes the lines to the operating system, so that a killed process loses none; never raises."""
        if not self._waiting:
            return
        data = "".join(self._waiting).encode()
        try:
            if self._file is None or not self.path.exists():  # it was moved or deleted
                self._open()
            assert self._file is not None
            if self._file.seek(0, os.SEEK_END) > self._written:
                data = b"\n" + data  # after a partial line that could not be removed
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._take_back()
            self._warn(error)
            return
        self._written = self._file.tell()
        self._waiting.clear()
        if self._warned:
            self._warned = False
            warn(f"{self.path} can be written again; no step is missing")

    def close(self) -> None:
        """Writes the lines that still wait and closes the file; never raises."""
        self.flush()
        if self._waiting:
            warn(f"{self.path} lacks the last {len(self._waiting)} steps")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _open(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.FileIO(self.path, "a")
        self._written = self._file.seek(0, os.SEEK_END)

    def _take_back(self) -> None:
        """Truncates what was written of the lines, so that they can be written again."""
        with contextlib.suppress(OSError, ValueError):
            if self._file is not None:
                self._file.truncate(self._written)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warn(f"{self.path} cannot be written ({error}); the run continues, and its lines wait until it can")


def read_metrics(path: pathlib.Path) -> list[Row]:
    """The rows of a metrics file in order of steps, without damaged lines and values; the last row of a step counts."""
    rows = {row["step"]: row for row, _ in _rows(path)}
    return [rows[step] for step in sorted(rows)]


def _rows(path: pathlib.Path) -> Iterator[tuple[Row, bytes]]:
    """The rows in a metrics file, without damaged lines and values, each with its line."""
    try:
        lines = read_document(path, None).splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)  # invalid UTF-8 is a ValueError too
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            if not all(map(_is_metric, row.values())):
                row = {name: value for name, value in row.items() if _is_metric(value)}
                line = _line(row).rstrip().encode()
            yield row, line


def _is_metric(value: Any) -> bool:
    """Whether a run can have written the value: a float, an integer of 64 bits, or null."""
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


WINDOW = "slots/window_steps"
"""Number of steps that the slot statistics of a row cover."""


def has_usage(row: Row) -> bool:
    """Whether a row has slot statistics."""
    return any(name.startswith("memory/") for name in row)


def usage_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with comparable slot statistics: those that cover the most common number of steps.

    Old rows, which lack that number, are taken to count from the previous row with statistics.
    """
    found, before = [], 0
    for row in rows:
        if has_usage(row):
            found.append({WINDOW: row["step"] - before} | row)
            before = row["step"]
    counts = Counter(row[WINDOW] for row in found)
    if not counts:
        return []
    window = max(counts, key=lambda steps: (counts[steps], steps))
    return [row for row in found if row[WINDOW] == window]


def comparable(rows: Sequence[Row]) -> list[Row]:
    """All rows, but without slot statistics in those that `usage_rows` leaves out."""
    kept = {row["step"] for row in usage_rows(rows)}
    usage = lambda name: name.startswith("memory/") or name == WINDOW
    return [
        row if row["step"] in kept else {name: value for name, value in row.items() if not usage(name)} for row in rows
    ]


def _line(row: Row) -> str:
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite) + "\n"
