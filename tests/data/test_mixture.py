"""The order of records equals Grain's, which yields one index at a time."""

import grain
import numpy as np
import pytest

from listed import Listed
from memjax.data.mixture import Order, Split
from memjax.data.sources.records import Segment
from memjax.data.tokenize import TextReader
from memjax.data.tokenizers.base import ByteTokenizer

SEED = 2**32 - 2  # the seed of the third split wraps around to 0


def splits_of(weights):
    """Splits of sources with 20, 21 and 22 records, without the first two records and the last."""
    readers = [TextReader(Listed([(Segment("a", True),)] * (20 + n)), ByteTokenizer()) for n in range(len(weights))]
    return [
        Split(reader=reader, start=2, stop=len(reader) - 1, weight=weight)
        for reader, weight in zip(readers, weights, strict=True)
    ]


def order_of_grain(splits, shuffle, repeat):
    parts, first = [], 0
    for number, split in enumerate(splits):
        part = grain.MapDataset.range(first + split.start, first + split.stop).seed((SEED + number) % 2**32)
        part = part.shuffle() if shuffle else part
        parts.append(part.repeat() if repeat else part)
        first += len(split.reader)
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [split.weight for split in splits])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [3.0, 1.0, 0.017], [1.0, 1e12, 7.0]])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("repeat", [True, False])
def test_the_order_is_that_of_grain(weights, shuffle, repeat):
    splits = splits_of(weights)
    order, expected = Order(splits, seed=SEED, shuffle=shuffle, repeat=repeat), order_of_grain(splits, shuffle, repeat)
    assert len(order) == len(expected)
    places = range(min(len(order), 300))
    np.testing.assert_array_equal(order[: len(places)], [expected[place] for place in places])
    if repeat:
        far = 10**14 + 7
        np.testing.assert_array_equal(order[far : far + 40], [expected[place] for place in range(far, far + 40)])
    else:
        assert len(order[len(order) - 3 : len(order) + 9]) == min(3, len(order))
