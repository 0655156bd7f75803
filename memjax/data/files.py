"""The files that a path names, their formats, and their records one after the other."""

import contextlib
import dataclasses
import glob
import gzip
import io
import lzma
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, BinaryIO, Literal

from memjax.data.parsing import Keys, MalformedError, fields_record, json_record, text_record
from memjax.data.records import Record
from memjax.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Format = Literal["jsonl", "text", "parquet", "array_record"]
Payload = bytes | dict[str, Any] | MalformedError
"""A record as its file has it: a line, the bytes of an ArrayRecord, fields of a Parquet row, or why there is none."""

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
_COMPRESSIONS = (".gz", ".xz", ".zst")
_ROWS_AT_ONCE = 1024
_RECORDS_AT_ONCE = 256


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
        """.gz, .xz, .zst or nothing."""
        return self.path.suffix if self.path.suffix in _COMPRESSIONS else ""

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
        source: what lines are; Parquet and ArrayRecord are known by their suffix. files goes by the suffix alone.
        field: the config field that names the path, for messages.

    Raises:
        DataError: there is no file, or its suffix does not say what it is.
    """
    place = pathlib.Path(path)
    if place.is_dir():
        kinds = _FORMATS.values() if source == "files" else (source, "parquet", "array_record")
        below = sorted(file for file in place.rglob("*") if file.is_file() and _suffix_format(file) in kinds)
        if not below:
            raise DataError(
                f"{path}: the folder holds no file that ends in {_suffixes(kinds)} (.gz, .xz or .zst may follow); "
                f"set {field} to a file, a folder of files or a glob"
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


class Stream:
    """The payloads of one file in order, each with its number (line, row or record, from 1).

    Where the file is cut off or damaged a MalformedError is the last payload, as it is the only one of an empty file.
    """

    def __init__(self, file: DataFile, keys: Keys):
        """Opens nothing yet.

        Args:
            file: what to read.
            keys: the columns that are read of a Parquet file.
        """
        self.file, self.keys = file, keys
        self.bytes_read = 0
        """Bytes of the file that are done with, as it lies on disk."""

    def __iter__(self) -> Iterator[tuple[int, Payload]]:
        """Reads the file.

        Raises:
            DataError: a package to read it with is not there.
        """
        read = {"parquet": self._rows, "array_record": self._records}.get(self.file.format, self._lines)
        number = 0
        try:
            for number, payload in read():
                yield number, payload
            if number == 0:
                yield 1, MalformedError("the file holds no text; remove it, or give it a record")
        except (OSError, EOFError, lzma.LZMAError, zlib.error, _BrokenFileError) as error:
            yield number + 1, MalformedError(f"the file is cut off or damaged here ({error}); make it again")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.file.path.open("rb") as raw, _decompressed(self.file, raw) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if line.strip():
                    self.bytes_read = raw.tell()
                    yield number, line

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        arrow = _pyarrow(self.file.path)
        size = self.file.path.stat().st_size
        number = 0
        try:
            with arrow.parquet.ParquetFile(self.file.path) as table:
                names = set(table.schema_arrow.names)
                wanted = [name for name in dataclasses.astuple(self.keys) if name in names]
                # A file without the fields is malformed row by row, like one of JSON lines.
                for batch in table.iter_batches(_ROWS_AT_ONCE, columns=wanted or None):
                    for row in batch.to_pylist():
                        number += 1
                        self.bytes_read = size * number // max(1, table.metadata.num_rows)
                        yield number, row
        except arrow.ArrowException as error:
            raise _BrokenFileError(f"not a whole Parquet file: {error}") from error

    def _records(self) -> Iterator[tuple[int, bytes]]:
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
                        yield number + 1, payload
                if not reader.ok():
                    raise _BrokenFileError("not a whole ArrayRecord file")
        except RuntimeError as error:
            raise _BrokenFileError(f"not a whole ArrayRecord file: {error}") from error


class _BrokenFileError(Exception):
    """A file is not what its suffix says, or not whole."""


def _decompressed(file: DataFile, raw: BinaryIO) -> Any:
    if file.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.compression == ".xz":
        return lzma.LZMAFile(raw)
    if file.compression == ".zst":
        return io.BufferedReader(_pyarrow(file.path).CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _pyarrow(path: pathlib.Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: needs the package pyarrow, which cannot be imported ({error}); pip install 'memjax[data]'"
        ) from error
    return pyarrow


def _data_file(path: pathlib.Path, source: Literal["jsonl", "text", "files"], field: str) -> DataFile:
    found = _suffix_format(path)
    if found in ("parquet", "array_record") and path.suffix in _COMPRESSIONS:
        raise DataError(f"{path}: {found} files are compressed in themselves; unpack it, or set {field} to another")
    if source != "files" and found not in ("parquet", "array_record"):
        found = source
    if found is None:
        raise DataError(
            f"{path}: the suffix does not say what the file is; name it {_suffixes(_FORMATS.values())} (.gz, .xz or "
            ".zst may follow), or set the source to jsonl or text"
        )
    return DataFile(path, found, as_text=source == "text" or found == "text")


def _suffix_format(path: pathlib.Path) -> Format | None:
    name = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return _FORMATS.get(name.suffix)


def _suffixes(formats: Iterable[str]) -> str:
    wanted = set(formats)
    return ", ".join(suffix for suffix, found in _FORMATS.items() if found in wanted)
