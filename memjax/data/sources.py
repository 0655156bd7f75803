"""Files of records with random access, and what a data config means by its source."""

import json
import mmap
import pathlib
from abc import abstractmethod
from typing import Any

import numpy as np

from memjax.config import DataConfig
from memjax.data.facts import BiographySource, QuestionSource
from memjax.data.records import DataError, Part, Record, Segment, Source, checked

__all__ = ["DataError", "JsonlSource", "Part", "Record", "Segment", "Source", "TextSource", "open_sources"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SCAN_BYTES = 1 << 22


class LineSource(Source):
    """The non-blank lines of a UTF-8 file; only their offsets are kept in memory."""

    def __init__(self, path: str | pathlib.Path, *, field: str = "data.path"):
        """Finds the lines.

        Args:
            path: the file.
            field: the config field that names it, for messages.

        Raises:
            DataError: the file is missing, cannot be read or holds no text.
        """
        self.path = pathlib.Path(path)
        self._bytes: mmap.mmap | None = None
        if not self.path.is_file():
            what = "is a folder, not a file" if self.path.is_dir() else "there is no such file"
            raise DataError(f"{self.path}: {what}; set {field} to a file that can be read")
        try:
            size = self.path.stat().st_size
            if size:
                self._starts, self._stops = _line_bounds(self._open())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error}); set {field} to a file that can") from error
        if not size or not len(self._starts):
            raise DataError(f"{self.path}: the file holds no text; set {field} to a file with at least one record")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        index = checked(index, len(self))
        line = self._open()[self._starts[index] : self._stops[index]]
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise self.error(
                index, f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
            ) from error
        return self._record(index, text)

    @abstractmethod
    def _record(self, index: int, line: str) -> Record: ...

    def error(self, index: int, what: str) -> DataError:
        """A DataError that begins with the file and the line of a record."""
        # Blank lines count in the file but not here, so the line is counted only when someone must be told.
        return DataError(f"{self.path}:{self._open()[: self._starts[index]].count(10) + 1}: {what}")

    def _open(self) -> mmap.mmap:
        if self._bytes is None:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}


class TextSource(LineSource):
    """A plain text file: every line that is not blank is a document, all of it learned."""

    def _record(self, index: int, line: str) -> Record:
        return (Segment(line, True),)


class JsonlSource(LineSource):
    """One JSON object a line: a text, or a prompt that is read and an answer that is learned."""

    def __init__(
        self,
        path: str | pathlib.Path,
        text_key: str = "text",
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        *,
        field: str = "data.path",
    ):
        """Finds the lines; objects are parsed when they are read.

        Args:
            path: the file.
            text_key: the field of a whole document; it wins over the other two.
            prompt_key: the field of a prompt.
            answer_key: the field of its answer.
            field: the config field that names the file, for messages.

        Raises:
            DataError: the file is missing, cannot be read or holds no text.
        """
        super().__init__(path, field=field)
        self.text_key = text_key
        self.prompt_key = prompt_key
        self.answer_key = answer_key

    def _record(self, index: int, line: str) -> Record:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self.error(index, f"not JSON ({error}); write one whole JSON object a line") from error
        if not isinstance(fields, dict):
            raise self.error(index, f"a JSON {_kind(fields)}, not an object; write one JSON object a line")
        if self.text_key in fields:
            return (Segment(self._text(index, fields, self.text_key), True),)
        if self.prompt_key not in fields or self.answer_key not in fields:
            raise self.error(
                index,
                f"has the fields {sorted(fields)}, but neither {self.text_key!r} nor both {self.prompt_key!r} and "
                f"{self.answer_key!r}; set data.text_key, or data.prompt_key and data.answer_key, to fields it has",
            )
        prompt = self._text(index, fields, self.prompt_key)
        answer = self._text(index, fields, self.answer_key)
        gap = "" if prompt[-1].isspace() or answer[0].isspace() else " "
        return Segment(prompt, False), Segment(gap + answer, True)

    def _text(self, index: int, fields: dict[str, Any], key: str) -> str:
        text = fields[key]
        if not isinstance(text, str):
            raise self.error(index, f"field {key!r} is a JSON {_kind(text)}, not a string; put the text in quotes")
        if not text:
            raise self.error(index, f"field {key!r} is an empty string; give it a text or remove the line")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise self.error(
                    index, f"field {key!r} holds half of a surrogate pair ({text[error.start]!a}); write both halves"
                ) from error
        return text


def open_sources(config: DataConfig) -> tuple[Source, Source | None]:
    """The records to train on and those to validate with.

    Files: the records of validation_path, or the last validation_fraction of the records of path (at least one);
    none when there is no such path and the fraction is 0. Biographies: the questions of held-out people, or of the
    people asked about in training when nobody is held out.

    Raises:
        DataError: a file is missing, empty, not named, or too short to be parted.
    """
    if config.source == "biographies":
        return BiographySource(config.biographies), QuestionSource(config.biographies)
    if config.path is None:
        raise DataError(f"data.path is not set; data.source={config.source} needs the file to train on")
    training = _open_file(config, config.path, "data.path")
    if config.validation_path is not None:
        return training, _open_file(config, config.validation_path, "data.validation_path")
    if config.validation_fraction == 0:
        return training, None
    if len(training) < 2:
        raise DataError(
            f"{config.path}: one record cannot be split into training and validation; "
            "set data.validation_path, or data.validation_fraction=0 for no validation"
        )
    num_held_out = min(max(1, round(len(training) * config.validation_fraction)), len(training) - 1)
    border = len(training) - num_held_out
    return Part(training, 0, border), Part(training, border, len(training))


def _open_file(config: DataConfig, path: str, field: str) -> Source:
    if config.source == "jsonl":
        return JsonlSource(path, config.text_key, config.prompt_key, config.answer_key, field=field)
    return TextSource(path, field=field)


def _line_bounds(file: mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """Where the non-blank lines start and stop, line ends left out; int64 [lines] each."""
    data = np.frombuffer(file, dtype=np.uint8)
    # In pieces, because the comparison makes an array as long as what it compares.
    ends = [np.flatnonzero(data[at : at + _SCAN_BYTES] == 10) + at for at in range(0, len(data), _SCAN_BYTES)]
    stops = np.concatenate([*ends, [len(data)]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    if file[:3] == _BYTE_ORDER_MARK:
        starts[0] = 3
    # A Windows line end belongs to the line end, not to the text.
    stops = stops - ((stops > starts) & (data[np.maximum(stops, 1) - 1] == 13))
    full = stops > starts
    starts, stops = starts[full], stops[full]
    # Only a line that begins with white space can be blank, so few lines are looked at one by one.
    suspects = np.flatnonzero(data[starts] <= 32)
    blank = [i for i in suspects if not file[starts[i] : stops[i]].strip()]
    return np.delete(starts, blank), np.delete(stops, blank)


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
