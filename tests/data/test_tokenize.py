import threading

import numpy as np
import pytest

from listed import Listed, pairs_by_hand
from memjax.data import tokenize
from memjax.data.sources.records import Segment
from memjax.data.tokenizers.base import ByteTokenizer


def test_remembered_texts_are_encoded_as_before(monkeypatch):
    monkeypatch.setattr(tokenize, "_CACHED_CHARACTERS", 2)
    monkeypatch.setattr(tokenize, "_CACHED_TEXTS", 3)
    records = [(Segment(text, True),) for text in ("a", "abc", "b", "c", "ab", "a", "abc", "abcabc")]
    reader = tokenize.TextReader(Listed(records), ByteTokenizer())
    rng = np.random.default_rng(0)
    for _ in range(3):
        for i, record in enumerate(records):
            assert [tuple(pair) for pair in reader([i], rng).pairs] == pairs_by_hand(record)


def test_joined_readers_index_all_records_and_name_the_part():
    parts = [["a", "bc"], ["d"], ["ef", "g", "h"]]
    readers = [tokenize.TextReader(Listed([(Segment(t, True),) for t in texts]), ByteTokenizer()) for texts in parts]
    joined = tokenize.joined(readers)
    everything = [(number, text) for number, texts in enumerate(parts) for text in texts]
    order = [5, 0, 2, 3, 1, 4, 2]
    for place, pairs in zip(order, joined(order, np.random.default_rng(0)).split(), strict=True):
        number, text = everything[place]
        assert pairs.tolist() == [[t, n, 1 + 2 * number] for t, n, _ in pairs_by_hand((Segment(text, True),))]


def test_few_long_records_or_many_short_ones_are_read_until_it_is_stopped(monkeypatch):
    monkeypatch.setattr(tokenize, "_PAIRS_UNTIL_STOPPED", 100)
    records = [(Segment("a" * (40 if 30 < i < 50 else 3), True),) for i in range(100)]
    reader = tokenize.TextReader(Listed(records), ByteTokenizer())
    asked, stop = [], threading.Event()

    def read(numbers, rng):
        asked.append(len(numbers))
        return reader(numbers, rng)

    some = tokenize.stoppable(read, stop)
    rng = np.random.default_rng(0)
    pairs = [pair for _ in range(2) for block in (range(0, 60), range(60, 100)) for pair in some(block, rng).pairs]
    assert [tuple(pair) for pair in pairs] == 2 * [pair for record in records for pair in pairs_by_hand(record)]
    assert asked[0] == 16
    assert {3, 25} <= set(asked)
    stop.set()
    with pytest.raises(InterruptedError):
        some(range(10), rng)
