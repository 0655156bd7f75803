"""Files of records with random access, and what a data config means by its source."""

import dataclasses
import mmap
import pathlib
from abc import abstractmethod
from typing import Any

import numpy as np

from memjax.config import DataConfig
from memjax.data.corpus import Corpus, border, training_corpora, validation_corpus
from memjax.data.facts import BiographySource, QuestionSource
from memjax.data.files import BYTE_ORDER_MARK, DataFile
from memjax.data.parsing import Keys, MalformedError, json_record, text_record
from memjax.data.records import Chain, Part, Record, Segment, Source, checked
from memjax.errors import DataError

__all__ = ["DataError", "JsonlSource", "Part", "Record", "Segment", "Source", "TextSource", "open_sources"]

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
        try:
            return self._record(self._open()[self._starts[index] : self._stops[index]])
        except MalformedError as error:
            # Blank lines count in the file but not here, so the line is counted only when someone must be told.
            line = self._open()[: self._starts[index]].count(10) + 1
            raise DataError(f"{self.path}:{line}: {error}") from error

    @abstractmethod
    def _record(self, line: bytes) -> Record: ...

    def _open(self) -> mmap.mmap:
        if self._bytes is None:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}


class TextSource(LineSource):
    """A plain text file: every line that is not blank is a document, all of it learned."""

    def _record(self, line: bytes) -> Record:
        return text_record(line)


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
        self.keys = Keys(text_key, prompt_key, answer_key)

    def _record(self, line: bytes) -> Record:
        return json_record(line, self.keys)


def open_sources(config: DataConfig) -> tuple[Source, Source | None]:
    """The records to train on and those to validate with, of data that is read as it lies.

    Files: the records of validation_path, or the last validation_fraction of the records of path (at least one);
    none when there is no such path and the fraction is 0. Biographies: the questions of held-out people, or of the
    people asked about in training when nobody is held out.

    Raises:
        DataError: a file is missing, empty, not named, or too short to be parted, or must be prepared first.
    """
    if config.source == "biographies":
        return BiographySource(config.biographies), QuestionSource(config.biographies)
    corpora = training_corpora(config)
    if len(corpora) > 1:
        raise DataError("data.source=mixture is read from prepared data only; see memjax.data.parts")
    training = open_corpus(corpora[0])
    if (validation := validation_corpus(config)) is not None:
        return training, open_corpus(validation)
    stop = border(len(training), config, corpora[0].path)
    if stop == len(training):
        return training, None
    return Part(training, 0, stop), Part(training, stop, len(training))


def open_corpus(corpus: Corpus) -> Source:
    """The records of files that can be read at random, as they lie.

    Raises:
        DataError: a file is missing, empty or must be prepared first.
    """
    sources = [_open_file(file, corpus) for file in corpus.files()]
    return sources[0] if len(sources) == 1 else Chain(sources)


def _open_file(file: DataFile, corpus: Corpus) -> LineSource:
    if not file.is_random_access:
        raise DataError(f"{file.path}: must be prepared first, by the training or by python -m memjax.prepare")
    if file.format == "jsonl":
        return JsonlSource(file.path, *dataclasses.astuple(corpus.keys), field=corpus.field)
    return TextSource(file.path, field=corpus.field)


def _line_bounds(file: mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """Where the non-blank lines start and stop, line ends left out; int64 [lines] each."""
    data = np.frombuffer(file, dtype=np.uint8)
    # In pieces, because the comparison makes an array as long as what it compares.
    ends = [np.flatnonzero(data[at : at + _SCAN_BYTES] == 10) + at for at in range(0, len(data), _SCAN_BYTES)]
    stops = np.concatenate([*ends, [len(data)]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    if file[:3] == BYTE_ORDER_MARK:
        starts[0] = 3
    # A Windows line end belongs to the line end, not to the text.
    stops = stops - ((stops > starts) & (data[np.maximum(stops, 1) - 1] == 13))
    full = stops > starts
    starts, stops = starts[full], stops[full]
    # Only a line that begins with white space can be blank, so few lines are looked at one by one.
    suspects = np.flatnonzero(data[starts] <= 32)
    blank = [i for i in suspects if not file[starts[i] : stops[i]].strip()]
    return np.delete(starts, blank), np.delete(stops, blank)
