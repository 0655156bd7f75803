"""Which files a data config means, part by part, and their records one after the other."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from memjax.config import DataConfig
from memjax.data.files import DataFile, Payload, Stream, find_files
from memjax.data.parsing import Keys, MalformedError
from memjax.data.records import Record
from memjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Files that are read as one, in order."""

    name: str
    """The folder of its prepared data."""
    path: str
    """A file, a folder or a glob."""
    source: Literal["jsonl", "text", "files"]
    """How lines are read."""
    field: str
    """The config field that names the path, for messages."""
    keys: Keys = dataclasses.field(default_factory=Keys)
    """The fields that hold the text."""
    malformed: Literal["strict", "skip"] = "strict"
    """What becomes of a record that cannot be used."""
    max_malformed: int = 1000
    """The most that may be left out."""
    weight: float = 1.0
    """Its share of a mixture."""

    def files(self) -> list[DataFile]:
        """Its files.

        Raises:
            DataError: there are none.
        """
        return find_files(self.path, self.source, self.field)

    def settings(self) -> dict[str, Any]:
        """What decides, beside the files and the tokenizer, which records they give."""
        return {"source": self.source, **dataclasses.asdict(self.keys), "malformed": self.malformed}

    def fingerprint(self, files: list[DataFile]) -> list[list[Any]]:
        """Name and size of every file, which change when files do and stay when they are copied."""
        base = pathlib.Path(self.path)
        return [
            [file.path.relative_to(base).as_posix() if base.is_dir() else file.path.name, file.path.stat().st_size]
            for file in files
        ]


def training_corpora(config: DataConfig) -> list[Corpus]:
    """What is trained on: one corpus, or the parts of a mixture; none for biographies.

    Raises:
        DataError: the config names no files.
    """
    if config.source == "biographies":
        return []
    if config.source == "mixture":
        return [
            _corpus(
                config,
                name=f"mixture-{part.name}",
                path=part.path,
                source=part.source,
                field=f"data.mixture[{number}].path",
                weight=part.weight,
            )
            for number, part in enumerate(config.mixture)
        ]
    if config.path is None:
        raise DataError(f"data.path is not set; data.source={config.source} needs the file to train on")
    return [_corpus(config, name="training", path=config.path, source=config.source, field="data.path")]


def validation_corpus(config: DataConfig) -> Corpus | None:
    """What is validated with where it has files of its own."""
    if config.source == "biographies" or config.validation_path is None:
        return None
    source = "files" if config.source == "mixture" else config.source
    field = "data.validation_path"
    return _corpus(config, name="validation", path=config.validation_path, source=source, field=field)


def _corpus(config: DataConfig, **fields: Any) -> Corpus:
    return Corpus(keys=Keys.of(config), malformed=config.malformed, max_malformed=config.max_malformed, **fields)


def must_be_prepared(corpus: Corpus, config: DataConfig) -> bool:
    """Whether a corpus cannot be read as it lies.

    Mixtures are weighted by tokens, and records that are left out are counted: both take a look at everything before.

    Raises:
        DataError: there are no files.
    """
    return (
        config.source == "mixture"
        or corpus.malformed == "skip"
        or not all(file.is_random_access for file in corpus.files())
    )


def border(count: int, config: DataConfig, path: str) -> int:
    """How many of the first records are trained on; those after them are held out.

    Raises:
        DataError: there are too few to part.
    """
    if config.validation_path is not None or config.validation_fraction == 0:
        return count
    if count < 2:
        raise DataError(
            f"{path}: one record cannot be split into training and validation; "
            "set data.validation_path, or data.validation_fraction=0 for no validation"
        )
    return count - min(max(1, round(count * config.validation_fraction)), count - 1)


class CorpusStream:
    """The payloads of all files of a corpus, and what becomes of those that cannot be used."""

    def __init__(self, corpus: Corpus):
        """Finds the files.

        Raises:
            DataError: there are none.
        """
        self.corpus = corpus
        self.files = corpus.files()
        self.total_bytes = sum(file.path.stat().st_size for file in self.files)
        self.num_malformed = 0
        self.examples: list[str] = []
        """The first payloads that were left out, and why."""
        self._bytes_before = 0
        self._stream: Stream | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files that are done with, as they lie on disk."""
        return self._bytes_before + (self._stream.bytes_read if self._stream else 0)

    def __iter__(self) -> Iterator[tuple[int, int, Payload]]:
        """The number of the file, the number of the payload in it, and the payload."""
        for index, file in enumerate(self.files):
            self._stream = Stream(file, self.corpus.keys)
            for number, payload in self._stream:
                yield index, number, payload
            self._bytes_before += file.path.stat().st_size
            self._stream = None

    def records(self) -> Iterator[Record]:
        """All records that can be used.

        Raises:
            DataError: one cannot be used, and may not be left out.
        """
        for index, number, payload in self:
            try:
                yield self.files[index].record(payload, self.corpus.keys)
            except MalformedError as error:
                self.leave_out(index, number, str(error))

    def leave_out(self, index: int, number: int, what: str) -> None:
        """Counts a payload that cannot be used.

        Raises:
            DataError: it may not be left out, or too many were.
        """
        where = f"{self.files[index].path}:{number}: {what}"
        if self.corpus.malformed == "strict":
            raise DataError(f"{where}; or leave such records out with data.malformed=skip")
        self.num_malformed += 1
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(where)
        if self.num_malformed > self.corpus.max_malformed:
            raise DataError(
                f"{self.corpus.path}: more than data.max_malformed={self.corpus.max_malformed} records cannot be used, "
                f"the last at {where}; mend the files or raise the limit. The first:\n  " + "\n  ".join(self.examples)
            )


_NUM_EXAMPLES = 10
