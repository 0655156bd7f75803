"""Random access to the lines of plain files, which are scanned once for line offsets.

Files are read with `pread` and never mapped, so a file that is truncated or rewritten during a run gives an error that
names it, rather than a bus error or different text.
"""

import bisect
import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from memjax.data.sources.files import DataFile
from memjax.data.sources.parsing import Keys, MalformedError
from memjax.data.sources.records import Record, Records, checked
from memjax.data.sources.stream import BYTE_ORDER_MARK, MAX_RECORD_BYTES, too_large
from memjax.errors import DataError

_SCAN_BYTES = 1 << 22
_OPEN_FILES = 64
_SAMPLES, _FEWEST_SAMPLES, _SAMPLE_BYTES = 64, 4, 4096
"""Fingerprints sample this many records over all files, at least this many per file, and this many bytes of each."""


@dataclasses.dataclass(slots=True)
class _Scan:
    """Line offsets of a file, and what tells whether it has changed."""

    size: int
    mtime_ns: int
    starts: np.ndarray
    stops: np.ndarray
    samples: list[str]


class LineRecords(Records):
    """The non-blank lines of UTF-8 files; only their offsets are kept in memory."""

    def __init__(
        self,
        files: Sequence[DataFile],
        keys: Keys | None = None,
        *,
        field: str = "data.path",
        max_bytes: int = MAX_RECORD_BYTES,
    ):
        """Scans plain files of text or JSON lines; error messages name the setting `field`.

        Raises:
            DataError: a file cannot be read or holds no text.
        """
        self.files = tuple(files)
        self.keys, self.max_bytes = keys or Keys(), max_bytes
        samples = max(_FEWEST_SAMPLES, _SAMPLES // len(self.files))
        self._scans = [_scanned(file.path, field, samples) for file in self.files]
        self._firsts = [0, *itertools.accumulate(len(scan.starts) for scan in self._scans)]
        self._open: dict[int, _OpenFile] = {}

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Record:
        owner = bisect.bisect_right(self._firsts, checked(index, len(self))) - 1
        file, scan, line = self.files[owner], self._scans[owner], index - self._firsts[owner]
        start, stop = int(scan.starts[line]), int(scan.stops[line])
        try:
            if stop - start > self.max_bytes:
                raise too_large(self.max_bytes)
            return file.record(self._read(owner, start, stop), self.keys)
        except MalformedError as error:
            # Blank lines have line numbers but no index, so lines are counted only for messages.
            raise DataError(
                f"{file.path}:{self._line_number(owner, start)}: {error}. To resume a run, replace the line and keep "
                "the number of lines, or set data.malformed=skip"
            ) from error

    def fingerprint(self) -> list[list[Any]]:
        """The size of each file, and digests of records spread evenly over it."""
        return [[scan.size, scan.samples] for scan in self._scans]

    def _read(self, owner: int, start: int, stop: int) -> bytes:
        path, scan = self.files[owner].path, self._scans[owner]
        try:
            file = self._file(owner)
            line = os.pread(file.handle, stop - start, start)
            status = os.fstat(file.handle)
            if status.st_mtime_ns != scan.mtime_ns or status.st_size != scan.size:
                # A copy with the same bytes counts as unchanged.
                samples = _samples(file.handle, scan.starts, scan.stops, len(scan.samples))
                if status.st_size != scan.size or samples != scan.samples:
                    raise _changed(path)
                scan.mtime_ns = status.st_mtime_ns
        except OSError as error:
            raise DataError(f"{path}: can no longer be read ({error}); put the file back") from error
        if len(line) != stop - start:
            raise _changed(path)
        return line

    def _file(self, owner: int) -> "_OpenFile":
        if (file := self._open.get(owner)) is None:
            while len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)), None)
            file = self._open[owner] = _OpenFile(self.files[owner].path)
        return file

    def _line_number(self, owner: int, start: int) -> int:
        with self.files[owner].path.open("rb") as file:
            pieces = (file.read(min(_SCAN_BYTES, start - at)) for at in range(0, start, _SCAN_BYTES))
            return 1 + sum(piece.count(b"\n") for piece in pieces)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class _OpenFile:
    """A file that stays open as long as a thread reads it, even after its eviction from the cache."""

    def __init__(self, path: pathlib.Path):
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


def _changed(path: pathlib.Path) -> DataError:
    return DataError(
        f"{path}: the file has changed since the run opened it; restore what it held, or start a new run with what it "
        "holds now"
    )


def _scanned(path: pathlib.Path, field: str, num_samples: int) -> _Scan:
    try:
        file = _OpenFile(path)
        status = os.fstat(file.handle)
        starts, stops = _line_bounds(file.handle, status.st_size)
        if not len(starts):
            raise DataError(f"{path}: the file holds no text; set {field} to a file with at least one record")
        samples = _samples(file.handle, starts, stops, min(num_samples, len(starts)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); set {field} to a file that can") from error
    return _Scan(status.st_size, status.st_mtime_ns, starts, stops, samples)


def _samples(handle: int, starts: np.ndarray, stops: np.ndarray, count: int) -> list[str]:
    """Digests of records spread evenly over a file."""
    found = []
    for sample in range(count):
        line = sample * len(starts) // count
        size = min(_SAMPLE_BYTES, int(stops[line] - starts[line]))
        piece = os.pread(handle, size, int(starts[line]))
        found.append(hashlib.blake2b(piece, digest_size=8).hexdigest())
    return found


def _line_bounds(handle: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and stop offsets of the non-blank lines, without line ends; int64 [lines] each."""
    starts, stops, suspects, before = [], [], [], b"\n"
    for at in range(0, size, _SCAN_BYTES):
        piece = os.pread(handle, min(_SCAN_BYTES, size - at), at)
        data = np.frombuffer(before + piece, np.uint8)
        begins = np.flatnonzero(data[:-1] == 10) + 1
        ends = np.flatnonzero(data[1:] == 10) + 1
        starts.append(begins + (at - 1))
        # The "\r" of a Windows line end is not part of the text.
        stops.append(ends + (at - 1) - (data[ends - 1] == 13))
        # Only lines that begin with white space can be blank, so few lines are checked individually.
        suspects.append(data[begins] <= 32)
        before = piece[-1:]
    if size and before != b"\n":
        stops.append(np.array([size - (before == b"\r")]))
    if not size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    first, last, suspect = (np.concatenate(parts) for parts in (starts, stops, suspects))
    if os.pread(handle, 3, 0) == BYTE_ORDER_MARK:
        first[0], suspect[0] = 3, True
    full = last > first
    for line in np.flatnonzero(full & suspect):
        full[line] = bool(os.pread(handle, last[line] - first[line], first[line]).strip())
    return first[full].astype(np.int64), last[full].astype(np.int64)
