"""Reads the records of files sequentially, in any format; truncated or damaged files are reported."""

import contextlib
import dataclasses
import glob
import io
import itertools
import json
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from memjax.data.sources.compression import decompressed, pyarrow_for
from memjax.data.sources.files import DataFile, Payload, find_files, suffix_format
from memjax.data.sources.parsing import Keys, MalformedError, json_fields
from memjax.data.sources.records import Record
from memjax.errors import DataError

T = TypeVar("T")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_RECORD_BYTES = 64_000_000
"""The default of `data.max_record_bytes`."""
_END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_ROWS_AT_ONCE = 1024
_RECORDS_AT_ONCE = 256
_SKIPPED_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class RecordFiles:
    """The records of a path from a command line, read like training data: format by suffix, compressed or not.

    Files with other suffixes are text. Each iteration reads the files again.
    """

    path: str
    """A file, a folder or a glob."""
    field: str
    """The option that gives the path, for error messages."""
    keys: Keys = dataclasses.field(default_factory=Keys)
    """The fields that hold the text."""

    def fields(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The place and the fields of every record; records of plain text have a single field `name`.

        Raises:
            DataError: a file cannot be read, or a line is not a JSON object or holds invalid Unicode.
        """

        def parse(file: DataFile, payload: Payload) -> dict[str, Any]:
            if isinstance(payload, dict):
                return payload
            if isinstance(payload, bytes) and not file.as_text:
                return _whole_unicode(json_fields(payload), payload)
            return {name: file.record(payload, self.keys)[0].text}

        return self._parsed(parse)

    def __iter__(self) -> Iterator[Record]:
        """Yields the records.

        Raises:
            DataError: a file or a record cannot be read.
        """
        return (record for _, record in self._parsed(lambda file, payload: file.record(payload, self.keys)))

    def _parsed(self, parse: Callable[[DataFile, Payload], T]) -> Iterator[tuple[str, T]]:
        path = pathlib.Path(self.path)
        known = path.is_dir() or glob.has_magic(self.path) or suffix_format(path) is not None
        for file in find_files(self.path, "files" if known else "text", self.field):
            for number, payload in Stream(file, self.keys):
                place = f"{file.path}:{number}"
                try:
                    yield place, parse(file, payload)
                except MalformedError as error:
                    raise DataError(f"{place}: {error}") from error


def _whole_unicode(fields: dict[str, Any], line: bytes) -> dict[str, Any]:
    """The fields of a line, checked to be valid Unicode, which tokenizers and output files require."""
    if b"\\u" in line:
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise MalformedError(f"holds half of a surrogate pair ({half!a}); write both halves") from error
    return fields


class UnreadableError(MalformedError):
    """A file is empty or cannot be read beyond some place; not about a single record."""

    def __init__(self, message: str, lost: float | None = None):
        """Takes the message, and the share of the file's bytes that is not read; None for an empty file."""
        super().__init__(message)
        self.lost = lost

    def __reduce__(self) -> tuple[type["UnreadableError"], tuple[str, float | None]]:
        return UnreadableError, (str(self), self.lost)


def too_large(limit: int) -> MalformedError:
    """The error for a record of more bytes than the limit."""
    return MalformedError(
        f"a record of more than data.max_record_bytes={limit:,} bytes; split it, or raise data.max_record_bytes"
    )


class Stream:
    """The payloads of one file in order, each with its number (line, row or record, from 1).

    The last payload of a truncated or damaged file is an UnreadableError, as is the only one of an empty file.
    """

    def __init__(self, file: DataFile, keys: Keys, max_bytes: int = MAX_RECORD_BYTES):
        """Records of more than max_bytes bytes are malformed; at most that much of a line is read into memory."""
        self.file, self.keys, self.max_bytes = file, keys, max_bytes
        self.bytes_read = 0
        """Bytes processed, before decompression."""

    def __iter__(self) -> Iterator[tuple[int, Payload]]:
        """Reads the file.

        Raises:
            DataError: a package needed to read it is missing, or the file cannot be opened.
        """
        try:
            self.file.path.open("rb").close()  # each format's library raises a different error for it
        except OSError as error:
            # Never skipped: prepared data would permanently lack a file that is only unreadable now.
            way_out = "; make it readable" if isinstance(error, PermissionError) else ""
            raise DataError(f"{self.file.path}: cannot be read ({error.strerror}){way_out}") from error
        read = {"parquet": self._rows, "arrow": self._rows, "array_record": self._records}.get(
            self.file.format, self._lines
        )
        number = 0
        try:
            for number, payload in read():
                yield number, payload
            if number == 0:
                yield 1, UnreadableError("the file holds no text; remove it, or give it a record")
        except DataError:
            raise
        except (OSError, EOFError, ValueError, MemoryError, lzma.LZMAError, zlib.error, _BrokenFileError) as error:
            lost = 1 - self.bytes_read / max(1, self.file.path.stat().st_size)
            share = f"; about {lost:.0%} of its bytes are not read" if lost >= 0.005 else ""
            message = f"the file is cut off or damaged here ({error}), and what follows is lost{share}"
            yield number + 1, UnreadableError(f"{message}; make it again", lost)

    def _lines(self) -> Iterator[tuple[int, Payload]]:
        with self.file.path.open("rb") as raw, decompressed(self.file.path, self.file.compression, raw) as lines:
            for number in itertools.count(1):
                line = lines.readline(self.max_bytes + 2)
                if not line:
                    return
                if number == 1 and line.startswith(BYTE_ORDER_MARK):  # not part of the record
                    line = line.removeprefix(BYTE_ORDER_MARK)
                    line += b"" if line.endswith(b"\n") else lines.readline(len(BYTE_ORDER_MARK))
                record = line.removesuffix(b"\n").removesuffix(b"\r")
                while not line.endswith(b"\n") and (more := lines.readline(_SKIPPED_BYTES)):
                    line = more[-1:]
                self.bytes_read = raw.tell()
                if len(record) > self.max_bytes:
                    yield number, too_large(self.max_bytes)
                elif record.strip():
                    yield number, record

    def _rows(self) -> Iterator[tuple[int, Payload]]:
        arrow = pyarrow_for(self.file.path)
        number = 0
        batches = self._parquet_batches if self.file.format == "parquet" else self._arrow_batches
        try:
            for batch in batches(arrow):
                # Offsets beyond the buffers would crash the process.
                batch.validate(full=self.file.format == "arrow")
                columns = {name: _values(batch.column(name)) for name in self._wanted(batch.schema.names)}
                for row in range(batch.num_rows):
                    number += 1
                    yield number, self._fields({name: values[row] for name, values in columns.items()})
        except arrow.ArrowException as error:
            raise _BrokenFileError(f"a truncated or damaged {self.file.format.capitalize()} file: {error}") from error

    def _wanted(self, names: Iterable[str]) -> list[str]:
        """The columns to read. If the file lacks the fields, every row is malformed, as with JSON lines.

        Raises:
            DataError: several columns have the same name.
        """
        names = list(names)
        wanted = [name for name in dataclasses.astuple(self.keys) if name in names] or names
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise DataError(f"{self.file.path}: several columns are called {twice[0]!r}; rename all but one")
        return wanted

    def _parquet_batches(self, arrow: ModuleType) -> Iterator[Any]:
        size, rows = self.file.path.stat().st_size, 0
        with arrow.parquet.ParquetFile(self.file.path, page_checksum_verification=True) as table:
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=self._wanted(table.schema_arrow.names)):
                rows += batch.num_rows
                yield batch
                self.bytes_read = size * rows // max(1, table.metadata.num_rows)

    def _arrow_batches(self, arrow: ModuleType) -> Iterator[Any]:
        """Batches of a stream, as Hugging Face's datasets writes them, or of a file with an index at its end."""
        with self.file.path.open("rb") as raw:
            if raw.read(6) == b"ARROW1":
                table = arrow.ipc.open_file(raw)
                yield from map(table.get_batch, range(table.num_record_batches))
                return
            raw.seek(-min(8, raw.seek(0, io.SEEK_END)), io.SEEK_END)
            is_whole = raw.read() == _END_OF_ARROW_STREAM
            raw.seek(0)
            for batch in arrow.ipc.open_stream(raw):
                yield batch
                self.bytes_read = raw.tell()
        if not is_whole:  # the library treats the end of the file as the end of the stream
            raise _BrokenFileError("the stream has no end")

    def _fields(self, row: dict[str, Any]) -> Payload:
        for value in row.values():
            if isinstance(value, MalformedError):
                return value
            if isinstance(value, str | bytes) and len(value) > self.max_bytes:
                return too_large(self.max_bytes)
        return row

    def _records(self) -> Iterator[tuple[int, Payload]]:
        from array_record.python.array_record_module import ArrayRecordReader

        size = self.file.path.stat().st_size
        try:
            # Closing raises as well if the file is not an ArrayRecord file, or truncated.
            with contextlib.closing(ArrayRecordReader(str(self.file.path))) as reader:
                count = reader.num_records()
                for start in range(0, count, _RECORDS_AT_ONCE):
                    numbers = range(start, min(start + _RECORDS_AT_ONCE, count))
                    payloads = reader.read(list(numbers))
                    if not reader.ok():
                        break
                    for number, payload in zip(numbers, payloads, strict=True):
                        self.bytes_read = size * (number + 1) // count
                        whole = len(payload) <= self.max_bytes
                        yield number + 1, payload if whole else too_large(self.max_bytes)
                if not reader.ok():
                    raise _BrokenFileError("a truncated or damaged ArrayRecord file")
        except RuntimeError as error:
            raise _BrokenFileError(f"a truncated or damaged ArrayRecord file: {error}") from error


class _BrokenFileError(Exception):
    """A file is not what its suffix says, or is truncated."""


def _values(column: Any) -> list[Any]:
    """The values of a column; a MalformedError in place of each that the library cannot convert, such as bad UTF-8."""
    try:
        return column.to_pylist()
    except ValueError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except ValueError as error:
        return MalformedError(f"not a value that can be read ({error}); write the text as UTF-8")
