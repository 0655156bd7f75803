"""Texts spread evenly over the training data, for training a tokenizer."""

import math
from collections.abc import Iterator

import numpy as np

from memjax.config import DataConfig
from memjax.data.corpus import Corpus, CorpusStream, must_be_prepared, training_corpora
from memjax.data.parsing import MalformedError
from memjax.data.records import Source
from memjax.data.sources import open_sources

_BIOGRAPHY_PASSES = 5
"""Tellings of each record that a BPE is trained on: about as many as there are wordings."""


def sample_texts(config: DataConfig, num_bytes: int) -> Iterator[str]:
    """Texts of all training records, or of records evenly spread, until there are num_bytes.

    Parts of a mixture give texts by their weights.

    Raises:
        DataError: the training data cannot be used.
    """
    if config.source == "biographies":
        yield from _of_source(open_sources(config)[0], _BIOGRAPHY_PASSES, num_bytes)
        return
    corpora = training_corpora(config)
    if not any(must_be_prepared(corpus, config) for corpus in corpora):
        yield from _of_source(open_sources(config)[0], 1, num_bytes)
        return
    whole = sum(corpus.weight for corpus in corpora)
    for corpus in corpora:
        yield from _of_stream(corpus, num_bytes * corpus.weight / whole)


def _of_source(source: Source, passes: int, num_bytes: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    # Steps of the golden ratio reach every record once, and wherever they stop they have been everywhere equally.
    step = max(1, round(len(source) * 0.618034))
    while math.gcd(step, len(source)) > 1:
        step += 1
    for count in range(passes * len(source)):
        for segment in source.draw(count * step % len(source), rng):
            yield segment.text
            num_bytes -= len(segment.text.encode())
        if num_bytes <= 0:
            return


def _of_stream(corpus: Corpus, num_bytes: float) -> Iterator[str]:
    """Every n-th record of files that can only be read from the start, n as small as num_bytes allow."""
    stream = CorpusStream(corpus)
    kept: list[str] = []
    size, every = 0, 1
    for count, (index, number, payload) in enumerate(stream):
        if count % every:
            continue
        try:
            record = stream.files[index].record(payload, corpus.keys)
        except MalformedError as error:
            stream.leave_out(index, number, str(error))
            record = ()
        # A record that was left out keeps its place, so that every n-th still is.
        kept.append("\n".join(segment.text for segment in record))
        size += len(kept[-1].encode())
        if size > 2 * num_bytes and len(kept) > 1:
            kept, every = kept[::2], 2 * every
            size = sum(len(text.encode()) for text in kept)
    share = min(1.0, num_bytes / max(1, size))
    for number, text in enumerate(kept):
        if text and int((number + 1) * share) > int(number * share):
            yield text
