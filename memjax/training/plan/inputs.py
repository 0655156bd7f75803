"""The files that a run reads, looked at before there is a run."""

from collections.abc import Iterator

from memjax.config.run import RunConfig
from memjax.data.sources.corpus import CorpusStream
from memjax.data.sources.kinds import find_source
from memjax.errors import DataError
from memjax.monitoring.units import gigabytes
from memjax.runs.folder import make_tokenizer


def describe(config: RunConfig) -> Iterator[str]:
    """A line on each part of the data, once its first record was read, and on a tokenizer that is not trained.

    Raises:
        ConfigError: the tokenizer has more tokens than the model has embeddings.
        DataError: the data or the tokenizer's file cannot be used.
        CheckpointError: train.init_from cannot be read.
    """
    source = find_source(config.data)
    if source.problem:
        yield f"{'data':<27} {source.problem}"
    for corpus in source.corpora:
        stream = CorpusStream(corpus)
        if next(stream.records(), None) is None:
            raise DataError(f"{corpus.path}: holds no record; set {corpus.field} to files that do")
        size = gigabytes(stream.total_bytes)
        yield f"{'data, ' + corpus.name:<27} {corpus.path}: {len(stream.files):,} files, {size}"
    if config.train.init_from or config.data.tokenizer.kind != "bpe":
        tokenizer = make_tokenizer(config, source)
        yield f"{'tokenizer':<27} {tokenizer.vocab_size:,} tokens; the model has {config.model.vocab_size:,}"
