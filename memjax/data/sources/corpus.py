"""Corpora of one or several files, with random access or as a stream."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from memjax.config.data import DataConfig
from memjax.data.sources.files import DataFile, Payload, find_files
from memjax.data.sources.lines import LineRecords
from memjax.data.sources.parsing import Keys, MalformedError
from memjax.data.sources.records import Record
from memjax.data.sources.stream import Stream, UnreadableError
from memjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files read one after the other as one corpus. They are listed once and, if plain, scanned once."""

    name: str
    """Name of the folder of its prepared data."""
    path: str
    """A file, a folder or a glob."""
    source: Literal["jsonl", "text", "files"]
    """How lines are parsed."""
    field: str
    """The setting that gives the path, for error messages."""
    config: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Names the fields that hold the text, and says how to treat malformed records."""
    weight: float = 1.0
    """Its share of a mixture."""

    @property
    def keys(self) -> Keys:
        """The fields that hold the text."""
        return Keys.of(self.config)

    @functools.cached_property
    def files(self) -> list[DataFile]:
        """The files, in sorted order; DataError if there are none."""
        return find_files(self.path, self.source, self.field)

    @property
    def is_random_access(self) -> bool:
        """Whether all files allow random access as they are."""
        return all(file.is_random_access for file in self.files)

    @functools.cached_property
    def lines(self) -> LineRecords:
        """The records of plain files.

        Raises:
            DataError: a file cannot be read or holds no text.
        """
        return LineRecords(self.files, self.keys, field=self.field, max_bytes=self.config.max_record_bytes)

    def settings(self) -> dict[str, Any]:
        """The settings that, besides files and tokenizer, determine the records."""
        return {"source": self.source, **dataclasses.asdict(self.keys), "malformed": self.config.malformed}

    def names_and_sizes(self) -> list[tuple[str, int]]:
        """Name and size of every file; the same for a copy."""
        base = pathlib.Path(self.path)
        return [
            (
                file.path.relative_to(base).as_posix() if base in file.path.parents else file.path.name,
                file.path.stat().st_size,
            )
            for file in self.files
        ]

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and samples of every plain file."""
        sampled = zip(self.names_and_sizes(), self.lines.fingerprint(), strict=True)
        return {"files": [[name, size, samples] for (name, _), (size, samples) in sampled]}


class CorpusStream:
    """The payloads of all files of a corpus; malformed ones are skipped and counted, or raise."""

    def __init__(self, corpus: Corpus):
        """Finds the files; DataError if there are none."""
        self.corpus = corpus
        self.files = corpus.files
        self.total_bytes = sum(file.path.stat().st_size for file in self.files)
        self.num_malformed = 0
        self.examples: list[str] = []
        """The first skipped payloads, with the reasons."""
        self._bytes_before = 0
        self._stream: Stream | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes processed in all files, before decompression."""
        return self._bytes_before + (self._stream.bytes_read if self._stream else 0)

    def __iter__(self) -> Iterator[tuple[int, int, Payload]]:
        """Yields the index of the file, the number of the payload in it, and the payload."""
        for index, file in enumerate(self.files):
            self._stream = Stream(file, self.corpus.keys, self.corpus.config.max_record_bytes)
            for number, payload in self._stream:
                yield index, number, payload
            self._bytes_before += file.path.stat().st_size
            self._stream = None

    def records(self) -> Iterator[Record]:
        """All usable records.

        Raises:
            DataError: a record cannot be used and may not be skipped.
        """
        for index, number, payload in self:
            if record := self.record(index, number, payload):
                yield record

    def record(self, index: int, number: int, payload: Payload) -> Record:
        """Parses a payload; a skipped one gives an empty record.

        Raises:
            DataError: it cannot be used and may not be skipped.
        """
        try:
            return self.files[index].record(payload, self.corpus.keys)
        except MalformedError as error:
            self.leave_out(index, number, error)
            return ()

    def leave_out(self, index: int, number: int, error: MalformedError) -> None:
        """Counts a malformed payload as skipped.

        Raises:
            DataError: it may not be skipped, or too many were.
        """
        config, where = self.corpus.config, f"{self.files[index].path}:{number}: {error}"
        if isinstance(error, UnreadableError) and error.lost is not None and config.damaged_files == "strict":
            raise DataError(
                f"{where}, or keep what can be read of such files with data.malformed=skip and data.damaged_files=skip"
            )
        if config.malformed == "strict":
            raise DataError(f"{where}; or skip such records with data.malformed=skip")
        self.num_malformed += 1
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(where)
        if self.num_malformed > config.max_malformed:
            raise DataError(
                f"{self.corpus.path}: more than data.max_malformed={config.max_malformed} records cannot be used, "
                f"the last at {where}; repair the files or raise the limit. The first:\n  " + "\n  ".join(self.examples)
            )


_NUM_EXAMPLES = 10
