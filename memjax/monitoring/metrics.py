"""`metrics.jsonl`: one line of JSON for every step of a run."""

import contextlib
import errno
import io
import json
import math
import os
import pathlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memjax.io.console import warn
from memjax.io.files import open_document, write_atomic

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
        self._file: io.FileIO | None = None
        self._rewrite(lambda row, line: line if row["step"] <= last_step else None)

    def write(self, row: Row) -> None:
        """Queues a row; values that are not finite become null, since JSON has no others."""
        self._waiting.append(_line(row))

    def amend(self, step: int, more: Row) -> None:
        """Adds metrics to the row of a step that is already in the file."""
        self.flush()
        try:
            self._rewrite(lambda row, line: _line(row | more).encode() if row["step"] == step else line)
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

    def _rewrite(self, change: Callable[[Row, bytes], bytes | None]) -> None:
        """Replaces every line by what `change` makes of it, in order of steps, and opens the file."""
        # Lines are kept as they are, since a long run has a million of them.
        lines = {row["step"]: new for row, line in _rows(self.path) if (new := change(row, line)) is not None}
        write_atomic(self.path, b"".join(lines[step] for step in sorted(lines)))
        self._open()

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


WINDOW = "slots/window_steps"
"""Number of steps that the slot statistics of a row cover."""


class Metrics:
    """The metrics of a run in order of its steps: one column each, so that a million steps take little memory.

    Slot statistics over another number of steps than most are left out, since they cannot be compared.
    """

    def __init__(self, rows: Iterable[Row]):
        """From the rows of a file, of which the last one of a step counts."""
        steps = array("q")
        found: dict[str, tuple[array[int], array[float]]] = {}
        self._fractional: set[str] = set()
        """The metrics with values that are not integers."""
        for number, row in enumerate(rows):
            steps.append(row["step"])
            for name, value in row.items():
                if name not in found:
                    found[name] = array("q"), array("d")
                numbers, values = found[name]
                numbers.append(number)
                values.append(math.nan if value is None else value)
                if isinstance(value, float):
                    self._fractional.add(name)
        # Of equal steps np.unique finds the first, which is the last in the file.
        self.steps, from_end = np.unique(np.asarray(steps, np.int64)[::-1], return_index=True)
        places = np.full(len(steps), -1)
        places[len(steps) - 1 - from_end] = np.arange(len(self.steps))
        self._columns: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        """Of each metric, the places in `steps` where it was written, and the values there; NaN for null."""
        for name in list(found):
            numbers, values = found.pop(name)  # so that what was read is freed on the way
            self._columns[name] = places[numbers], np.asarray(values)
            self._keep([name], np.arange(len(self.steps)))
        self._usage = self._keep_equal_windows()

    def values(self, name: str) -> NDArray[np.float64]:
        """A metric at every step; NaN where it was not measured, or was not finite."""
        full = np.full(len(self.steps), np.nan)
        places, values = self._columns.get(name, ((), ()))
        full[np.asarray(places, int)] = values
        return full

    def names(self) -> list[str]:
        """The names of all metrics."""
        return list(self._columns)

    def last(self) -> Row:
        """The metrics of the last step, with its number; empty without steps."""
        return self._row(len(self.steps) - 1) if len(self.steps) else {}

    def last_usage(self) -> Row:
        """The metrics of the last step with slot statistics, with its number; empty without any."""
        return self._row(int(self._usage[-1])) if len(self._usage) else {}

    def _row(self, place: int) -> Row:
        row = {}
        for name, (places, values) in self._columns.items():
            for value in values[places == place].tolist():
                row[name] = None if math.isnan(value) else value if name in self._fractional else int(value)
        return row

    def _keep(self, names: Iterable[str], places: NDArray[np.int64]) -> None:
        for name in names:
            there, values = self._columns[name]
            is_kept = np.isin(there, places)
            self._columns[name] = there[is_kept], values[is_kept]

    def _keep_equal_windows(self) -> NDArray[np.int64]:
        """Leaves out the slot statistics over another number of steps than the most common one; returns the places of
        the rest.

        Old rows, which lack that number, are taken to count from the previous row with statistics.
        """
        names = [name for name in self._columns if name.startswith("memory/")]
        places = np.unique(np.concatenate([self._columns[name][0] for name in names] or [np.arange(0)]))
        windows = self.values(WINDOW)[places]
        windows = np.where(np.isnan(windows), np.diff(self.steps[places], prepend=0), windows)
        lengths, counts = np.unique(windows, return_counts=True)
        places = places[np.isin(windows, lengths[counts == counts.max(initial=0)][-1:])]
        self._keep([*names, *({WINDOW} & self._columns.keys())], places)
        return places


def read_metrics(path: pathlib.Path) -> Metrics:
    """The metrics in a file, without damaged lines and values."""
    return Metrics(row for row, _ in _rows(path))


def has_metrics(path: pathlib.Path) -> bool:
    """Whether a file has the metrics of any step."""
    return any(True for _ in _rows(path))


def _rows(path: pathlib.Path) -> Iterator[tuple[Row, bytes]]:
    """The rows in a metrics file, without damaged lines and values, each with its line."""
    with contextlib.suppress(FileNotFoundError), open_document(path) as lines:
        for line in lines:
            try:
                row = json.loads(line)  # invalid UTF-8 is a ValueError too
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int and _is_metric(row["step"]):
                if not all(map(_is_metric, row.values())):
                    row = {name: value for name, value in row.items() if _is_metric(value)}
                    line = _line(row).encode()
                yield row, line.rstrip() + b"\n"


def _is_metric(value: Any) -> bool:
    """Whether a run can have written the value: a float, an integer of 64 bits, or null."""
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def _line(row: Row) -> str:
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite) + "\n"
