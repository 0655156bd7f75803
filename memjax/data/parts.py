"""The parts that training and validation read, each with its reader: prepared where it must be, else as it lies."""

import dataclasses
import pathlib
from collections.abc import Sequence

import grain

from memjax.config import DataConfig
from memjax.data.corpus import Corpus, border, must_be_prepared, training_corpora, validation_corpus
from memjax.data.preparation import prepare
from memjax.data.prepared import Manifest, PreparedReader, is_prepared, open_prepared
from memjax.data.reading import JoinedReader, Reader, TextReader
from memjax.data.records import Record, Source, checked
from memjax.data.sources import open_corpus, open_sources
from memjax.data.tokenizer import Tokenizer
from memjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The records start..stop - 1 of a reader."""

    reader: Reader
    start: int
    stop: int
    weight: float = 1.0
    """Of its tokens among those of all parts."""

    @property
    def manifest(self) -> Manifest | None:
        """What is known of prepared data."""
        return self.reader.manifest if isinstance(self.reader, PreparedReader) else None

    @property
    def record_weight(self) -> float:
        """Of its records among those of all parts: the longer they are, the fewer give as many tokens."""
        manifest = self.manifest
        return self.weight if manifest is None else self.weight * manifest.records / manifest.tokens


class PartSource(Source):
    """The records of parts as text, those of the first, then those of the second."""

    def __init__(self, parts: Sequence[Part]):
        self._numbers = [(part.reader, number) for part in parts for number in range(part.start, part.stop)]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        reader, number = self._numbers[checked(index, len(self))]
        return reader.record(number)


def prepared_folder(corpus: Corpus, config: DataConfig) -> pathlib.Path:
    """Where the prepared data of a corpus lies.

    Raises:
        DataError: the config names no folder.
    """
    if config.prepared is None:
        raise DataError(f"data.prepared is not set; {corpus.path} must be prepared, which takes a folder")
    return pathlib.Path(config.prepared) / corpus.name


def open_parts(config: DataConfig, tokenizer: Tokenizer) -> tuple[list[Part], list[Part]]:
    """The parts to train on and those to validate with (none when nothing is held out).

    What must be prepared and is not is prepared here. What was prepared is read from there, and gives the same tokens.

    Raises:
        DataError: the data cannot be used, or the prepared data is of something else.
    """
    if config.source == "biographies":
        sources = open_sources(config)
        training, validation = (TextReader(source, tokenizer) for source in sources if source is not None)
        return [_whole(training)], [_whole(validation)]
    corpora = training_corpora(config)
    readers = [_open(corpus, config, tokenizer) for corpus in corpora]
    stops = [border(len(reader), config, corpus.path) for reader, corpus in zip(readers, corpora, strict=True)]
    training = [
        Part(reader=reader, start=0, stop=stop, weight=corpus.weight)
        for reader, stop, corpus in zip(readers, stops, corpora, strict=True)
    ]
    if (own := validation_corpus(config)) is not None:
        return training, [_whole(_open(own, config, tokenizer))]
    held_out = [dataclasses.replace(part, start=part.stop, stop=len(part.reader)) for part in training]
    return training, [part for part in held_out if part.start < part.stop]


def reader_of(parts: Sequence[Part], config: DataConfig) -> Reader:
    """One reader of all records of the parts' readers; of a mixture it tells the number of the part."""
    return JoinedReader([part.reader for part in parts]) if config.source == "mixture" else parts[0].reader


def order(parts: Sequence[Part], *, seed: int, shuffle: bool, repeat: bool) -> grain.MapDataset[int]:
    """The numbers of the records, in the order in which they are to be seen, as `reader_of` counts them.

    Args:
        parts: what is mixed, by weight.
        seed: orders the records.
        shuffle: in every epoch of a part anew, or as they lie.
        repeat: without end, each part in epochs of its own; or until a part has no more.
    """
    orders, first = [], 0
    for number, part in enumerate(parts):
        numbers = grain.MapDataset.range(first + part.start, first + part.stop).seed((seed + number) % 2**32)
        if shuffle:
            numbers = numbers.shuffle()
        orders.append(numbers.repeat() if repeat else numbers)
        first += len(part.reader)
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [part.record_weight for part in parts])


def prepare_parts(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Prepares what must be prepared and is not, in order; `open_parts` would do the same.

    Raises:
        DataError: the data cannot be used.
    """
    if config.source != "biographies":
        for corpus in filter(None, [*training_corpora(config), validation_corpus(config)]):
            if _is_read_prepared(corpus, config):
                prepare(corpus, tokenizer, prepared_folder(corpus, config))


def malformed_counts(parts: Sequence[Part]) -> dict[str, int]:
    """For metrics: how many records were left out, where any could have been."""
    manifests = [part.manifest for part in parts if part.manifest is not None]
    if not any(manifest.settings["malformed"] == "skip" for manifest in manifests):
        return {}
    return {"data/malformed": sum(manifest.malformed for manifest in manifests)}


def describe(parts: Sequence[Part]) -> list[str]:
    """Lines about the prepared data among the parts, and what was left out of it."""
    lines = []
    for part in parts:
        if isinstance(part.reader, PreparedReader):
            manifest = part.reader.manifest
            lines.append(
                f"prepared   {part.reader.folder}: {manifest.records:,} records, {manifest.tokens:,} tokens"
                + (f", {manifest.malformed:,} malformed records left out, such as" if manifest.malformed else "")
            )
            lines += [f"           {example}" for example in manifest.examples[:3]]
    return lines


def _whole(reader: Reader) -> Part:
    return Part(reader=reader, start=0, stop=len(reader))


def _open(corpus: Corpus, config: DataConfig, tokenizer: Tokenizer) -> Reader:
    if not _is_read_prepared(corpus, config):
        return TextReader(open_corpus(corpus), tokenizer)
    folder = prepared_folder(corpus, config)
    prepare(corpus, tokenizer, folder)
    return open_prepared(folder, corpus, tokenizer)


def _is_read_prepared(corpus: Corpus, config: DataConfig) -> bool:
    done = config.prepared is not None and is_prepared(prepared_folder(corpus, config))
    return done or must_be_prepared(corpus, config)
