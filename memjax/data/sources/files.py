"""The files that a path names, their formats, and their records one after the other."""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, BinaryIO, Literal

from memjax.data.sources.parsing import Keys, MalformedError, fields_record, json_fields, json_record, text_record
from memjax.data.sources.records import Record
from memjax.errors import DataError
from memjax.io import remote
from memjax.io.paths import is_remote

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Format = Literal["jsonl", "text", "parquet", "arrow", "array_record"]
MAX_RECORD_BYTES = 64_000_000
"""The default of `data.max_record_bytes`."""
Payload = bytes | dict[str, Any] | MalformedError
"""A record as its file has it: a line, the bytes of an ArrayRecord, the fields of a row, or why there is none."""

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
_BINARY = ("parquet", "arrow", "array_record")
"""Formats that are known by their suffix whatever lines are, and compressed in themselves."""
_END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_COMPRESSIONS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    # The letters alone may begin a text; the size of blocks and a block, or the end of the stream, follow them.
    ".bz2": re.compile(rb"BZh[1-9](?:1AY|\x17rE)"),
}
"""By suffix, what such files begin with."""
_MAGIC_BYTES = 7
"""The longest of these."""
_ROWS_AT_ONCE = 1024
_RECORDS_AT_ONCE = 256
_SKIPPED_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_XZ_MEMORY = 1 << 30
"""A dictionary that takes more is refused; xz -9 takes 65 MB."""


@dataclasses.dataclass(frozen=True, slots=True)
class DataFile:
    """A file with records."""

    path: pathlib.Path
    format: Format
    """text and jsonl have a record in every line that is not blank."""
    as_text: bool
    """ArrayRecord: whether a record is a text, not a JSON object."""

    @property
    def compression(self) -> str:
        """.gz, .xz, .zst, .bz2 or nothing: by what the file begins with, or else by its suffix."""
        suffix = _compression(self.path)
        if self.format in _BINARY:
            return suffix
        try:
            with self.path.open("rb") as file:
                start = file.read(_MAGIC_BYTES)
        except OSError:
            return suffix  # reading it says what is wrong
        return next((name for name, magic in _COMPRESSIONS.items() if magic.match(start)), suffix)

    @property
    def is_random_access(self) -> bool:
        """Whether records can be found without reading what is before them."""
        return self.format in ("jsonl", "text") and not self.compression

    def record(self, payload: Payload, keys: Keys) -> Record:
        """The record that a payload of this file holds.

        Raises:
            MalformedError: it cannot be used.
        """
        if isinstance(payload, MalformedError):
            raise payload
        if isinstance(payload, dict):
            return fields_record(payload, keys)
        return text_record(payload) if self.as_text else json_record(payload, keys)


def find_files(path: str, source: Literal["jsonl", "text", "files"], field: str) -> list[DataFile]:
    """The files of a path in sorted order.

    Of a folder, whatever lies below it with a suffix that the source reads; of a glob, all that it finds.

    Args:
        path: a file, a folder or a glob.
        source: what lines are; Parquet, Arrow and ArrayRecord are known by their suffix, with `files` so is the rest.
        field: the config field that names the path, for messages.

    Raises:
        DataError: there is no file, or its suffix does not say what it is.
    """
    if is_remote(path):
        try:
            path = str(remote.fetch(path))
        except Exception as error:  # of any file system
            raise DataError(f"{path}: cannot be read ({error}); set {field} to a file that can") from error
    place = pathlib.Path(path)
    if place.is_dir():
        kinds = _FORMATS.values() if source == "files" else (source, *_BINARY)
        below = sorted(file for file in place.rglob("*") if file.is_file() and _suffix_format(file) in kinds)
        if any(_suffix_format(file) == "arrow" for file in below):  # beside them datasets' save_to_disk puts two files
            below = [file for file in below if file.name not in ("dataset_info.json", "state.json")]
        if not below:
            raise DataError(
                f"{path}: the folder holds no file that ends in {_suffixes(kinds)} (.gz, .xz, .zst or .bz2 may "
                f"follow); set {field} to a file, a folder of files or a glob"
            )
        return [_data_file(file, source, field) for file in below]
    if place.is_file():
        return [_data_file(place, source, field)]
    if not glob.has_magic(path):
        raise DataError(f"{path}: there is no such file; set {field} to a file that can be read")
    found = sorted(pathlib.Path(file) for file in glob.glob(path, recursive=True))
    if not (files := [file for file in found if file.is_file()]):
        raise DataError(f"{path}: there is no such file: the glob finds nothing; set {field} to one that does")
    return [_data_file(file, source, field) for file in files]


@dataclasses.dataclass(frozen=True)
class RecordFiles:
    """The records of a path that a command line names, read as training reads its data: by suffix, packed or not.

    Other suffixes are text. Iterating reads the files anew.
    """

    path: str
    """A file, a folder or a glob."""
    field: str
    """The option that names it, for messages."""
    keys: Keys = dataclasses.field(default_factory=Keys)
    """The fields that hold the text."""

    def fields(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The place and the fields of every record; a text is the field `name`.

        Raises:
            DataError: a file cannot be read, or a record of JSON lines is no object.
        """
        for file, place, payload in self._payloads():
            try:
                if isinstance(payload, dict):
                    yield place, payload
                elif isinstance(payload, bytes) and not file.as_text:
                    yield place, json_fields(payload)
                else:
                    yield place, {name: file.record(payload, self.keys)[0].text}
            except MalformedError as error:
                raise DataError(f"{place}: {error}") from error

    def __iter__(self) -> Iterator[Record]:
        """The records.

        Raises:
            DataError: a file or a record cannot be read.
        """
        for file, place, payload in self._payloads():
            try:
                yield file.record(payload, self.keys)
            except MalformedError as error:
                raise DataError(f"{place}: {error}") from error

    def _payloads(self) -> Iterator[tuple[DataFile, str, Payload]]:
        path = pathlib.Path(self.path)
        known = path.is_dir() or glob.has_magic(self.path) or _suffix_format(path) is not None
        for file in find_files(self.path, "files" if known else "text", self.field):
            for number, payload in Stream(file, self.keys):
                yield file, f"{file.path}:{number}", payload


class UnreadableError(MalformedError):
    """A file holds nothing, or from some place on cannot be read; no record is meant."""

    def __init__(self, message: str, lost: float | None = None):
        """Takes the message, and the share of the file's bytes that is not read; None for a file that is empty."""
        super().__init__(message)
        self.lost = lost

    def __reduce__(self) -> tuple[type["UnreadableError"], tuple[str, float | None]]:
        return UnreadableError, (str(self), self.lost)


def too_large(limit: int) -> MalformedError:
    """Why a record of more bytes than the limit is not read."""
    return MalformedError(
        f"a record of more than data.max_record_bytes={limit:,} bytes; split it, or raise data.max_record_bytes"
    )


class Stream:
    """The payloads of one file in order, each with its number (line, row or record, from 1).

    Where the file is cut off or damaged an UnreadableError is the last payload, as it is the only one of an empty file.
    """

    def __init__(self, file: DataFile, keys: Keys, max_bytes: int = MAX_RECORD_BYTES):
        """Opens nothing yet.

        Args:
            file: what to read.
            keys: the columns that are read of a Parquet file.
            max_bytes: the largest record; of a larger one no more is read into memory.
        """
        self.file, self.keys, self.max_bytes = file, keys, max_bytes
        self.bytes_read = 0
        """Bytes of the file that are done with, as it lies on disk."""

    def __iter__(self) -> Iterator[tuple[int, Payload]]:
        """Reads the file.

        Raises:
            DataError: a package to read it with is not there.
        """
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
        with self.file.path.open("rb") as raw, _decompressed(self.file, raw) as lines:
            for number in itertools.count(1):
                line = lines.readline(self.max_bytes + 2)
                if not line:
                    return
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                is_whole = line.endswith(b"\n") or len(line) <= self.max_bytes
                while not line.endswith(b"\n") and (more := lines.readline(_SKIPPED_BYTES)):
                    line = more[-1:]
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                self.bytes_read = raw.tell()
                if not is_whole:
                    yield number, too_large(self.max_bytes)
                elif line.strip():
                    yield number, line

    def _rows(self) -> Iterator[tuple[int, Payload]]:
        arrow = _pyarrow(self.file.path)
        number = 0
        batches = self._parquet_batches if self.file.format == "parquet" else self._arrow_batches
        try:
            for batch in batches(arrow):
                # Offsets beyond the buffers would end the process.
                batch.validate(full=self.file.format == "arrow")
                columns = {name: _values(batch.column(name)) for name in self._wanted(batch.schema.names)}
                for row in range(batch.num_rows):
                    number += 1
                    yield number, self._fields({name: values[row] for name, values in columns.items()})
        except arrow.ArrowException as error:
            raise _BrokenFileError(f"not a whole {self.file.format.capitalize()} file: {error}") from error

    def _wanted(self, names: Iterable[str]) -> list[str]:
        """The columns to read. A file without the fields is malformed row by row, like one of JSON lines."""
        names = list(names)
        return [name for name in dataclasses.astuple(self.keys) if name in names] or names

    def _parquet_batches(self, arrow: ModuleType) -> Iterator[Any]:
        size, rows = self.file.path.stat().st_size, 0
        with arrow.parquet.ParquetFile(self.file.path, page_checksum_verification=True) as table:
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=self._wanted(table.schema_arrow.names)):
                rows += batch.num_rows
                yield batch
                self.bytes_read = size * rows // max(1, table.metadata.num_rows)

    def _arrow_batches(self, arrow: ModuleType) -> Iterator[Any]:
        """Of a stream, as Hugging Face's datasets writes them, or of a file with an index at its end."""
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
        if not is_whole:  # its library takes the end of the file for the end of the stream
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
            # Closing a file that is none, or only half of one, says so too.
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
                    raise _BrokenFileError("not a whole ArrayRecord file")
        except RuntimeError as error:
            raise _BrokenFileError(f"not a whole ArrayRecord file: {error}") from error


class _BrokenFileError(Exception):
    """A file is not what its suffix says, or not whole."""


class _Streams(io.RawIOBase):
    """The streams of an .xz or .bz2 file end to end.

    `lzma.LZMAFile` and `bz2.BZ2File` take a damaged header of a later stream for garbage after the end, and silently
    leave out all that follows.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]):
        self._raw, self._new = raw, new
        self._stream = new()
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._stream.eof and not self._next_stream():
                return 0
            packed, self._packed = self._packed, b""
            if not packed and self._stream.needs_input and not (packed := self._raw.read(_PIECE_BYTES)):
                raise EOFError("the last stream has no end")
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bool:
        packed = self._stream.unused_data
        while not (rest := packed.lstrip(b"\0")):  # zeros pad a stream to a multiple of 4 bytes
            if not (packed := self._raw.read(_PIECE_BYTES)):
                return False
        self._packed, self._stream = rest, self._new()
        return True


def _new_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def _values(column: Any) -> list[Any]:
    """The values of a Parquet column; a MalformedError for each that its library cannot give, as bad UTF-8."""
    try:
        return column.to_pylist()
    except ValueError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except ValueError as error:
        return MalformedError(f"not a value that can be read ({error}); write the text as UTF-8")


def _decompressed(file: DataFile, raw: BinaryIO) -> Any:
    compression = file.compression
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".bz2":
        return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), 1 << 20)
    if compression == ".xz":
        return io.BufferedReader(_Streams(raw, _new_xz), 1 << 20)
    if compression == ".zst":
        return io.BufferedReader(_pyarrow(file.path).CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _pyarrow(path: pathlib.Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: needs the package pyarrow, which cannot be imported ({error}); pip install pyarrow"
        ) from error
    return pyarrow


def _data_file(path: pathlib.Path, source: Literal["jsonl", "text", "files"], field: str) -> DataFile:
    found = _suffix_format(path)
    if found in _BINARY and _compression(path):
        raise DataError(f"{path}: {found} files are compressed in themselves; unpack it, or set {field} to another")
    if source != "files" and found not in _BINARY:
        found = source
    if found is None:
        raise DataError(
            f"{path}: the suffix does not say what the file is; name it {_suffixes(_FORMATS.values())} (.gz, .xz, "
            ".zst or .bz2 may follow), or set the source to jsonl or text"
        )
    return DataFile(path, found, as_text=source == "text" or found == "text")


def _suffix_format(path: pathlib.Path) -> Format | None:
    name = path.with_suffix("") if _compression(path) else path
    return _FORMATS.get(name.suffix.lower())


def _compression(path: pathlib.Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


def _suffixes(formats: Iterable[str]) -> str:
    wanted = set(formats)
    return ", ".join(suffix for suffix, found in _FORMATS.items() if found in wanted)
