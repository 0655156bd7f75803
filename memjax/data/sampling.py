"""Samples texts evenly from the training data, to train a tokenizer."""

import math
from collections.abc import Iterator

import numpy as np

from memjax.data.sources.corpus import Corpus, CorpusStream
from memjax.data.sources.records import Records


def spread_over_records(records: Records, passes: int, num_bytes: int, count: int | None = None) -> Iterator[str]:
    """Texts of the first `count` records (None: all), evenly spread, up to num_bytes or `passes` passes over them.

    Raises:
        DataError: a record cannot be used.
    """
    size = len(records) if count is None else count
    rng = np.random.default_rng(0)
    # Steps of the golden ratio visit every record once, and spread evenly over them wherever they stop.
    step = max(1, round(size * 0.618034))
    while math.gcd(step, size) > 1:
        step += 1
    for number in range(passes * size):
        for segment in records.draw(number * step % size, rng):
            yield segment.text
            num_bytes -= len(segment.text.encode())
        if num_bytes <= 0:
            return


def spread_over_stream(corpus: Corpus, num_bytes: float) -> Iterator[str]:
    """Texts of every n-th record of files without random access, with the smallest n that num_bytes allows.

    Raises:
        DataError: a record cannot be used and may not be skipped.
    """
    stream = CorpusStream(corpus)
    kept: list[str] = []
    size, every = 0, 1
    for count, (index, number, payload) in enumerate(stream):
        if count % every:
            continue
        record = stream.record(index, number, payload)
        # A skipped record keeps its place, so that the rest are still every n-th.
        kept.append("\n".join(segment.text for segment in record))
        size += len(kept[-1].encode())
        if size > 2 * num_bytes and len(kept) > 1:
            kept, every = kept[::2], 2 * every
            size = sum(len(text.encode()) for text in kept)
    share = min(1.0, num_bytes / max(1, size))
    for number, text in enumerate(kept):
        if text and int((number + 1) * share) > int(number * share):
            yield text
