"""Kinds of data: the meaning of a config's `source`, independent of a tokenizer. Each is one entry of `SOURCES`."""

import pathlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np

from memjax.config.data import BiographiesConfig, DataConfig
from memjax.data.mixture import Split, num_training_records
from memjax.data.prepared.prepare import discard_outdated, prepare
from memjax.data.prepared.store import PreparedReader, is_prepared, open_prepared
from memjax.data.sampling import spread_over_records, spread_over_stream
from memjax.data.sources.biographies import BiographyRecords, QuestionRecords
from memjax.data.sources.corpus import Corpus
from memjax.data.sources.huggingface import DatasetCorpus
from memjax.data.tokenize import Reader, TextReader
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import DataError

_BIOGRAPHY_PASSES = 5
"""How often a BPE is trained on each record: about as often as there are wordings."""


class Source(ABC):
    """One kind of data. Files are listed and scanned once, when first needed."""

    people: BiographiesConfig | None = None
    """The people whose facts the data states, for the recall test; None for other data."""
    corpora: Sequence[Corpus] = ()
    """The files; empty for generated data."""
    problem: str | None = None
    """Why the config cannot be used; None if it can."""

    def __init__(self, config: DataConfig):
        self.config = config

    @abstractmethod
    def texts(self, num_bytes: int) -> Iterator[str]:
        """Texts spread evenly over the training data, at least num_bytes if it has that many.

        Raises:
            DataError: the data cannot be used.
        """

    @abstractmethod
    def open(self, tokenizer: Tokenizer) -> tuple[list[Split], list[Split]]:
        """The training splits and the validation splits (may be empty).

        Raises:
            DataError: the data cannot be used, or prepared data was made from something else.
        """

    def discard_outdated(self, tokenizer: Tokenizer) -> None:
        """Removes data that a start with other settings prepared in the run's own folder before its first step.

        Raises:
            DataError: it cannot be read or removed.
        """
        return


class Biographies(Source):
    """Generated people; validation asks about those for whom training holds no questions."""

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self.people = config.biographies

    def texts(self, num_bytes: int) -> Iterator[str]:
        return spread_over_records(BiographyRecords(self.config.biographies), _BIOGRAPHY_PASSES, num_bytes)

    def open(self, tokenizer: Tokenizer) -> tuple[list[Split], list[Split]]:
        people = self.config.biographies
        training, validation = (
            Split.of(TextReader(records, tokenizer)) for records in (BiographyRecords(people), QuestionRecords(people))
        )
        return [training], [validation]


class Files(Source):
    """The files of a path: plain ones are read directly, others from prepared data."""

    KIND: ClassVar[type[Corpus]] = Corpus

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self.training, self.validation = self._training(), self._validation()
        self.corpora = [*self.training, *([self.validation] if self.validation else [])]

    @property
    def _format(self) -> Literal["jsonl", "text", "files"]:
        return self.config.source if self.config.source in ("jsonl", "text") else "files"

    def _training(self) -> list[Corpus]:
        path, field = self.config.path, "data.path"
        if path is None:
            self.problem = f"data.path is null: source={self.config.source} needs a file; set --data.path FILE"
            return []
        return [self.KIND(name="training", path=path, source=self._format, field=field, config=self.config)]

    def _validation(self) -> Corpus | None:
        path, field = self.config.validation_path, "data.validation_path"
        if path is None:
            return None
        return Corpus(name="validation", path=path, source=self._format, field=field, config=self.config)

    def texts(self, num_bytes: int) -> Iterator[str]:
        """Texts of every corpus, in proportion to its weight."""
        self._check()
        if not any(map(self._must_be_prepared, self.training)):
            (corpus,) = self.training
            yield from spread_over_records(corpus.lines, 1, num_bytes, self._num_training(corpus, len(corpus.lines)))
            return
        total = sum(corpus.weight for corpus in self.training)
        for corpus in self.training:
            yield from spread_over_stream(corpus, num_bytes * corpus.weight / total)

    def open(self, tokenizer: Tokenizer) -> tuple[list[Split], list[Split]]:
        """The splits of each corpus; data that must be prepared is prepared here unless it already was."""
        self._check()
        readers = [self._reader(corpus, tokenizer) for corpus in self.training]
        training, held_out = [], []
        for corpus, reader in zip(self.training, readers, strict=True):
            stop = self._num_training(corpus, len(reader))
            if not _has_records(reader, stop):
                raise DataError(
                    f"{corpus.path}: none of the first {stop:,} records, which are those for training, can be used; "
                    "repair the files, or hold out fewer with data.validation_fraction"
                )
            training.append(Split(reader=reader, start=0, stop=stop, weight=corpus.weight))
            if stop < len(reader):
                held_out.append(Split(reader=reader, start=stop, stop=len(reader), weight=corpus.weight))
        if self.validation is not None:
            return training, [Split.of(self._reader(self.validation, tokenizer))]
        return training, held_out

    def prepare(self, tokenizer: Tokenizer, *, every_seconds: float) -> None:
        """Prepares all corpora, including those that could be read directly.

        Raises:
            DataError: records cannot be used.
        """
        for corpus in self.corpora:
            prepare(corpus, tokenizer, self._folder(corpus), every_seconds=every_seconds)

    def discard_outdated(self, tokenizer: Tokenizer) -> None:
        for corpus in self.corpora:
            discard_outdated(corpus, tokenizer, self._folder(corpus))

    def _check(self) -> None:
        if self.problem:
            raise DataError(self.problem)

    def _must_be_prepared(self, corpus: Corpus) -> bool:
        """Whether it cannot be read directly; counting skipped records requires a pass over all of them."""
        return self.config.malformed == "skip" or not corpus.is_random_access

    def _folder(self, corpus: Corpus) -> pathlib.Path:
        if self.config.prepared is None:
            raise DataError(f"data.prepared is not set; {corpus.path} must be prepared, which takes a folder")
        return pathlib.Path(self.config.prepared) / corpus.name

    def _reader(self, corpus: Corpus, tokenizer: Tokenizer) -> Reader:
        has_folder = self.config.prepared is not None
        if not (has_folder and is_prepared(self._folder(corpus))) and not self._must_be_prepared(corpus):
            return TextReader(corpus.lines, tokenizer, corpus.fingerprint())
        folder = self._folder(corpus)
        prepare(corpus, tokenizer, folder, asked_for=False)
        return open_prepared(folder, corpus, tokenizer)

    def _num_training(self, corpus: Corpus, count: int) -> int:
        fraction = self.config.validation_fraction if self.validation is None else 0.0
        if count == 1 and fraction and corpus.is_random_access:
            _ = corpus.lines[0]  # reports a file of another kind, such as a JSON array, as such
        return num_training_records(count, fraction, corpus.path)


def _has_records(reader: Reader, stop: int) -> bool:
    """Whether any of the first `stop` records was not skipped: otherwise training would search for one forever."""
    if not (isinstance(reader, PreparedReader) and reader.manifest.malformed):
        return True
    rng, block = np.random.default_rng(0), 4096
    return any(len(reader(range(at, min(at + block, stop)), rng).pairs) for at in range(0, stop, block))


class HuggingFace(Files):
    """A data set of the Hugging Face Hub, or in a folder that the package datasets reads."""

    KIND = DatasetCorpus


class Mixture(Files):
    """Several corpora weighted by tokens, which are counted by preparing the data."""

    def _training(self) -> list[Corpus]:
        return [
            Corpus(
                name=f"mixture-{part.name}",
                path=part.path,
                source=part.source,
                field=f"data.mixture[{number}].path",
                weight=part.weight,
                config=self.config,
            )
            for number, part in enumerate(self.config.mixture)
        ]

    def _must_be_prepared(self, corpus: Corpus) -> bool:
        return True


SOURCES: dict[str, type[Source]] = {
    "biographies": Biographies,
    "jsonl": Files,
    "text": Files,
    "files": Files,
    "huggingface": HuggingFace,
    "mixture": Mixture,
}


def find_source(config: DataConfig) -> Source:
    """The source that a config names; files are listed and scanned when first needed."""
    return SOURCES[config.source](config)
