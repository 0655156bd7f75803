"""Describes the files that a run would read, for the dry run."""

import pathlib
from collections.abc import Iterator

from memjax.config.run import RunConfig
from memjax.data.sources.corpus import Corpus, CorpusStream
from memjax.data.sources.huggingface import DatasetCorpus
from memjax.data.sources.kinds import find_source
from memjax.errors import DataError
from memjax.io.paths import is_remote
from memjax.monitoring.units import gigabytes
from memjax.runs.folder import make_tokenizer

_NOT_READ = "not read; the run copies it to this machine"


def describe(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Rows about each part of the data, after reading its first record, and about a tokenizer that is not trained.

    Data that a run would first copy to this machine is only named.

    Raises:
        ConfigError: the tokenizer has more tokens than the model has embeddings.
        DataError: the data or the tokenizer's file cannot be used.
        CheckpointError: train.init_from cannot be read.
    """
    source = find_source(config.data)
    if source.problem:
        yield "data", source.problem
    for corpus in source.corpora:
        name = f"data, {corpus.name}"
        if _is_elsewhere(corpus):
            yield name, f"{corpus.path}: {_NOT_READ}"
            continue
        stream = CorpusStream(corpus)
        if next(stream.records(), None) is None:
            raise DataError(f"{corpus.path}: has no records; set {corpus.field} to files that do")
        files = len(stream.files)
        yield name, f"{corpus.path}: {files:,} {'file' if files == 1 else 'files'}, {gigabytes(stream.total_bytes)}"
    if config.train.init_from and is_remote(config.train.init_from):
        yield "tokenizer", f"of {config.train.init_from}: {_NOT_READ}"
    elif config.train.init_from or config.data.tokenizer.kind != "bpe":
        tokenizer = make_tokenizer(config, source)
        yield "tokenizer", f"{tokenizer.vocab_size:,} tokens; the model has {config.model.vocab_size:,}"


def _is_elsewhere(corpus: Corpus) -> bool:
    """Whether reading the corpus would copy it here first."""
    if isinstance(corpus, DatasetCorpus):
        return not pathlib.Path(corpus.path).exists()  # otherwise a name of the Hub
    return is_remote(corpus.path)
