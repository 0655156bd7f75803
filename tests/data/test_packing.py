import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listed import BOS, EOS, Listed, pairs_by_hand
from memjax.data import packing
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
            grain.MapDataset.range(len(records)),
            TextReader(Listed(records), ByteTokenizer()),
            packing=kind,
            sequence_length=LENGTH,
            num_rows=ROWS,
            document_mask=document_mask,
            seed=5,
        )
    )


def rows_of(batches):
    """Per row of all batches: the list of its pieces, each a list of (token, target, counts); checks the frame."""
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
    found = packing.batches(
        grain.MapDataset.range(len(records)).repeat(),
        TextReader(Listed(records), ByteTokenizer()),
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
    # A piece begins at a row's start or with a record.
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


def test_first_fit_wastes_little():
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
