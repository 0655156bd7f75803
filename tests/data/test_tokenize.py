import numpy as np

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


def test_joined_readers_count_on_and_name_the_part():
    parts = [["a", "bc"], ["d"], ["ef", "g", "h"]]
    readers = [tokenize.TextReader(Listed([(Segment(t, True),) for t in texts]), ByteTokenizer()) for texts in parts]
    joined = tokenize.joined(readers)
    everything = [(number, text) for number, texts in enumerate(parts) for text in texts]
    order = [5, 0, 2, 3, 1, 4, 2]
    for place, pairs in zip(order, joined(order, np.random.default_rng(0)).split(), strict=True):
        number, text = everything[place]
        assert pairs.tolist() == [[t, n, 1 + 2 * number] for t, n, _ in pairs_by_hand((Segment(text, True),))]
