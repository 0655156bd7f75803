"""Finds the files of a path and their formats."""

import dataclasses
import glob
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

from memjax.data.sources.compression import by_content, by_suffix
from memjax.data.sources.parsing import Keys, MalformedError, fields_record, json_record, text_record
from memjax.data.sources.records import Record
from memjax.errors import DataError
from memjax.io import remote
from memjax.io.paths import is_remote

Format = Literal["jsonl", "text", "parquet", "arrow", "array_record"]
Payload = bytes | dict[str, Any] | MalformedError
"""A record as stored: a line, the bytes of an ArrayRecord, the fields of a row, or the reason why it is malformed."""

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
"""Formats always recognised by suffix, whatever the source, and with internal compression."""


@dataclasses.dataclass(frozen=True, slots=True)
class DataFile:
    """A file with records."""

    path: pathlib.Path
    format: Format
    """text and jsonl have one record per non-blank line."""
    as_text: bool
    """Whether a record's bytes are plain text, not a JSON object."""

    @property
    def compression(self) -> str:
        """.gz, .xz, .zst, .bz2 or nothing: by magic bytes, or else by suffix."""
        return by_suffix(self.path) if self.format in _BINARY else by_content(self.path)

    @property
    def is_random_access(self) -> bool:
        """Whether a record can be read without reading those before it."""
        return self.format in ("jsonl", "text") and not self.compression

    def record(self, payload: Payload, keys: Keys) -> Record:
        """Parses a payload of this file; MalformedError if it cannot be used."""
        if isinstance(payload, MalformedError):
            raise payload
        if isinstance(payload, dict):
            return fields_record(payload, keys)
        return text_record(payload) if self.as_text else json_record(payload, keys)


def find_files(path: str, source: Literal["jsonl", "text", "files"], field: str) -> list[DataFile]:
    """The files of a path in sorted order.

    A folder stands for all files below it with a suffix that the source reads, a glob for all files that it matches;
    neither for hidden ones, such as the copies in .ipynb_checkpoints.
    Parquet, Arrow and ArrayRecord files are recognised by suffix; the format of other files is `source`, or given by
    the suffix if that is `files`. Error messages name the setting `field`.

    Raises:
        DataError: there is no file, or its suffix is unknown.
    """
    if is_remote(path):
        try:
            path = str(remote.fetch(path))
        except Exception as error:  # every file system raises its own
            raise DataError(f"{path}: cannot be read ({error}); set {field} to a file that can") from error
    place = pathlib.Path(path)
    if place.is_dir():
        kinds = _FORMATS.values() if source == "files" else (source, *_BINARY)
        if (place / "dataset_dict.json").exists():
            raise DataError(
                f"{path}: the folder holds the splits of a data set; set {field} to one of them, as {path}/train"
            )
        visible = [
            file for file in place.rglob("*") if not any(name.startswith(".") for name in file.relative_to(place).parts)
        ]
        below = sorted(file for file in visible if file.is_file() and suffix_format(file) in kinds)
        if any(suffix_format(file) == "arrow" for file in below):  # datasets' save_to_disk adds two other files
            below = [file for file in below if file.name not in ("dataset_info.json", "state.json")]
        if not below:
            # Only the data of a run has such a setting.
            known = field.startswith("data.") and any(suffix_format(file) for file in visible)
            other = "; source=files reads those that it holds" if known else ""
            raise DataError(
                f"{path}: the folder holds no file that ends in {_suffixes(kinds)} (.gz, .xz, .zst or .bz2 may "
                f"follow); set {field} to a file, a folder of files or a glob{other}"
            )
        return [_data_file(file, source, field) for file in below]
    if place.is_file():
        return [_data_file(place, source, field)]
    if place.exists():
        raise DataError(f"{path}: is a pipe or a device, which cannot be read twice; save what it gives to a file")
    if not glob.has_magic(path):
        raise DataError(f"{path}: there is no such file; set {field} to a file that can be read")
    found = sorted(pathlib.Path(file) for file in glob.glob(path, recursive=True))
    if not (files := [file for file in found if file.is_file()]):
        raise DataError(f"{path}: there is no such file: the glob finds nothing; set {field} to one that does")
    return [_data_file(file, source, field) for file in files]


def _data_file(path: pathlib.Path, source: Literal["jsonl", "text", "files"], field: str) -> DataFile:
    found = suffix_format(path)
    if found in _BINARY and by_suffix(path):
        raise DataError(f"{path}: {found} files are compressed in themselves; unpack it, or set {field} to another")
    if source != "files" and found not in _BINARY:
        found = source
    if found is None:
        raise DataError(
            f"{path}: the suffix does not say what the file is; name it {_suffixes(_FORMATS.values())} (.gz, .xz, "
            ".zst or .bz2 may follow), or set the source to jsonl or text"
        )
    return DataFile(path, found, as_text=source == "text" or found == "text")


def suffix_format(path: pathlib.Path) -> Format | None:
    """The format given by a file's suffix, ignoring that of a compression; None if unknown."""
    name = path.with_suffix("") if by_suffix(path) else path
    return _FORMATS.get(name.suffix.lower())


def _suffixes(formats: Iterable[str]) -> str:
    wanted = set(formats)
    return ", ".join(suffix for suffix, found in _FORMATS.items() if found in wanted)
