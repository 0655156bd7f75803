import itertools
import json

import grain
import numpy as np
import pytest
from grain.experimental import ConcatThenSplitIterDataset, FirstFitPackIterDataset, FlatMapIterDataset
from hypothesis import given
from hypothesis import strategies as st

from listed import BOS, EOS, Listed, pairs_by_hand
from memjax.data import packing
from memjax.data.mixture import Order, Split
from memjax.data.sources.records import Segment
from memjax.data.tokenize import TextReader
from memjax.data.tokenizers.base import ByteTokenizer

LENGTH, ROWS = 7, 3


segments = st.builds(Segment, st.text("abc", max_size=6), st.booleans())
corpora = st.lists(st.lists(segments, min_size=1, max_size=3).map(tuple), min_size=1, max_size=12)
kinds = pytest.mark.parametrize("kind", ["none", "concat", "first_fit"])


def pack(records, kind, document_mask=True):
    return list(
        packing.batches(
            range(len(records)),
            TextReader(Listed(records), ByteTokenizer()),
            packing=kind,
            sequence_length=LENGTH,
            num_rows=ROWS,
            document_mask=document_mask,
            seed=5,
        )
    )


def endless(reader):
    """Repeats all records in order, endlessly."""
    return Order([Split.of(reader)], seed=0, shuffle=False, repeat=True)


def rows_of(batches):
    """Splits every row into its pieces, each a list of (token, target, counts), and checks the shapes of the arrays."""
    rows = []
    for batch in batches:
        assert set(batch) == {"tokens", "targets", "segments", "positions", "loss_mask"}
        for name, array in batch.items():
            assert array.shape == (ROWS, LENGTH)
            assert array.dtype == (np.float32 if name == "loss_mask" else np.int32)
        for r in range(ROWS):
            pieces = []
            for s in range(LENGTH):
                segment = batch["segments"][r, s]
                pair = (batch["tokens"][r, s], batch["targets"][r, s], batch["loss_mask"][r, s])
                if segment == 0:
                    assert pair == (0, 0, 0)
                    assert all(batch["segments"][r, s:] == 0)
                    assert batch["positions"][r, s] == 0
                    continue
                if segment > len(pieces):
                    assert segment == len(pieces) + 1
                    pieces.append([])
                assert segment == len(pieces)
                assert batch["positions"][r, s] == len(pieces[-1])
                pieces[-1].append(pair)
            rows.append(pieces)
    return rows


@given(records=corpora)
def test_unpacked_rows_are_the_records_cut_at_the_end(records):
    rows = rows_of(pack(records, "none"))
    assert [row for row in rows if row] == [[pairs_by_hand(record)[:LENGTH]] for record in records]


@kinds
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_endless_records_come_in_batches_of_any_size(kind, num_rows):
    records = [(Segment(letter, True),) for letter in "abc"]
    reader = TextReader(Listed(records), ByteTokenizer())
    found = packing.batches(
        endless(reader),
        reader,
        packing=kind,
        sequence_length=2,
        num_rows=num_rows,
        document_mask=True,
        seed=5,
    )
    rows = [row for batch, _ in zip(found, range(6), strict=False) for row in batch["targets"].tolist()]
    letters = [pairs_by_hand(record)[0][1] for record in records]
    assert len(rows) == 6 * num_rows
    assert [row[0] for row in rows] == letters * (2 * num_rows) or kind == "first_fit"


@given(records=corpora)
def test_concat_is_the_records_end_to_end(records):
    rows = [row for row in rows_of(pack(records, "concat")) if row]
    stream = [pair for record in records for pair in pairs_by_hand(record)]
    assert [pair for row in rows for piece in row for pair in piece] == stream
    assert all(sum(map(len, row)) == LENGTH for row in rows[:-1])
    # A piece begins at the start of a row or of a record.
    assert all(piece[0][0] == BOS for row in rows for piece in row[1:])


@given(records=corpora)
def test_first_fit_keeps_records_whole_unless_they_are_longer_than_a_row(records):
    rows = rows_of(pack(records, "first_fit"))
    expected = []
    for record in records:
        pairs = pairs_by_hand(record)
        expected += [pairs[at : at + LENGTH] for at in range(0, len(pairs), LENGTH)]
    assert sorted(piece for row in rows for piece in row) == sorted(expected)


@kinds
@given(records=corpora)
def test_without_a_document_mask_a_row_is_one_text(kind, records):
    for masked, bare in zip(pack(records, kind), pack(records, kind, document_mask=False), strict=True):
        for name in ("tokens", "targets", "loss_mask"):
            np.testing.assert_array_equal(masked[name], bare[name])
        np.testing.assert_array_equal(bare["segments"], masked["segments"] > 0)
        expected = [[place if segment else 0 for place, segment in enumerate(row)] for row in masked["segments"]]
        assert bare["positions"].tolist() == expected


def test_first_fit_leaves_little_padding():
    rng = np.random.default_rng(0)
    records = [(Segment("a" * int(n), True),) for n in rng.integers(0, LENGTH, size=2000)]
    filled = np.mean([(batch["segments"] > 0).mean() for batch in pack(records, "first_fit")])
    assert filled > 0.9


def test_only_pairs_whose_target_is_learned_count():
    batch = pack([(Segment("ab", False), Segment("c", True)), (Segment("c", True), Segment("a", False))], "concat")[0]
    a, b, c = (ord(letter) + 3 for letter in "abc")
    assert batch["tokens"][0].tolist() == [BOS, a, b, c, BOS, c, a]
    assert batch["targets"][0].tolist() == [a, b, c, EOS, c, a, EOS]
    assert batch["loss_mask"][0].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert batch["segments"][0].tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 0, 1, 2]


class Cut(grain.experimental.FlatMapTransform):
    """Cuts a block of records into pieces of at most `longest` pairs."""

    max_fan_out = 1

    def __init__(self, longest):
        self.longest = longest

    def flat_map(self, element):
        return [
            {"pairs": np.array(pairs[at : at + self.longest], np.int32)}
            for pairs in element
            for at in range(0, len(pairs), self.longest)
        ]


def rows_of_grain(records, kind):
    """Packs the records, repeated a thousand times, with Grain's own packers and yields the rows."""
    blocks = grain.MapDataset.range(len(records)).repeat(1000).batch(packing._BLOCK, batch_fn=list)
    blocks = blocks.map(lambda numbers: [pairs_by_hand(records[number]) for number in numbers])
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    pieces = FlatMapIterDataset(blocks.to_iter_dataset(options), Cut(LENGTH if kind == "first_fit" else 1000))
    if kind == "concat":
        return iter(ConcatThenSplitIterDataset(pieces, length_struct={"pairs": LENGTH}))
    return iter(FirstFitPackIterDataset(pieces, length_struct={"pairs": LENGTH}, num_packing_bins=4, seed=5))


def in_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("kind", ["concat", "first_fit"])
@given(records=corpora, block=st.sampled_from([1, 2, 3, 64]))
def test_rows_and_places_are_those_of_grains_packers(kind, records, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memjax.data.packing._BLOCK", block)
        patch.setattr("memjax.data.packers._NUM_BINS", 4)
        reader = TextReader(Listed(records), ByteTokenizer())
        settings = {"packing": kind, "sequence_length": LENGTH, "num_rows": ROWS, "document_mask": True, "seed": 5}
        data = packing.batches(endless(reader), reader, **settings)
        batches, rows = iter(data), rows_of_grain(records, kind)
        for _ in range(6):
            place = in_json(rows.get_state())
            assert in_json(batches.get_state()) == place
            again = iter(data)
            again.set_state(place)
            assert in_json(again.get_state()) == place
            expected = list(itertools.islice(rows, ROWS))
            for batch in (next(batches), next(again)):
                for row, packed in enumerate(expected):
                    for name, column in (("tokens", 0), ("targets", 1), ("loss_mask", 2)):
                        np.testing.assert_array_equal(batch[name][row], packed["pairs"][:, column])
                    np.testing.assert_array_equal(batch["segments"][row], packed["pairs_segment_ids"])
                    np.testing.assert_array_equal(batch["positions"][row], packed["pairs_positions"])
