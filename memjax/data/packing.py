"""From records to batches: token ids, what follows each, what counts, and which record a place belongs to.

A record of n tokens (begin and end included) becomes n - 1 pairs of a token and the one to be predicted from it. Pairs
are what gets packed, so no pair is lost where a row ends and none joins the end of one record to the next one's begin.
"""

import dataclasses
import sys
from typing import Any, Literal

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset, FirstFitPackIterDataset, FlatMapIterDataset

from memjax.data.tokenize import Pairs, Read

Batch = dict[str, np.ndarray]
"""Arrays of shape [batch, sequence_length].

int32 `tokens` and `targets`; int32 `segments` (0 is padding, else the record's number in its row) and `positions`;
float32 `loss_mask` (1 where the target is learned, else 0). Of mixtures also int32 `sources`, the number of the part.
"""

_FEATURE = "pairs"
_NUM_BINS = 64
"""Rows that first_fit fills side by side; more waste less padding and come out in larger bursts."""
_BLOCK = 64
"""Records read and tokenised in one call; work per record is dear, Grain's own above all."""


def batches(
    numbers: grain.MapDataset[int],
    read: Read,
    *,
    packing: Literal["none", "concat", "first_fit"],
    sequence_length: int,
    num_rows: int,
    document_mask: bool,
    seed: int,
    with_sources: bool = False,
    shard: slice = slice(None),
) -> grain.IterDataset[Batch]:
    """Batches of num_rows rows; a last one that records do not fill is padded with empty rows.

    Args:
        numbers: the numbers of the records, in the order in which they are to be seen.
        read: gives the records.
        packing: none cuts a record at sequence_length pairs; the others cut it into rows, and lose nothing.
        sequence_length: pairs in a row.
        num_rows: rows in a batch.
        document_mask: number the records of a row and their positions, or treat a row as one text.
        seed: chooses the wordings of the records, and orders the rows that first_fit fills together.
        with_sources: add the part of a mixture that each token is from.
        shard: which of the blocks of records that are read together, for one of several workers.
    """
    finish = _Finish(num_rows=num_rows, document_mask=document_mask, with_sources=with_sources)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if packing == "none":
        # Grain rounds the length of endless numbers up, for one row past the longest that Python has.
        endless = len(numbers) == sys.maxsize
        blocks = numbers.batch(num_rows, drop_remainder=endless, batch_fn=list).random_map(read, seed=seed)
        return blocks.map(_OneEach(sequence_length)).map(finish)[shard].to_iter_dataset(options)
    blocks = numbers.batch(_BLOCK, batch_fn=list).random_map(read, seed=seed)
    cut = _Pieces(None if packing == "concat" else sequence_length)
    pieces = FlatMapIterDataset(blocks[shard].to_iter_dataset(options), cut)
    rows: grain.IterDataset[Any]
    if packing == "concat":
        rows = ConcatThenSplitIterDataset(pieces, length_struct={_FEATURE: sequence_length})
    else:
        rows = FirstFitPackIterDataset(
            pieces, length_struct={_FEATURE: sequence_length}, num_packing_bins=_NUM_BINS, seed=seed
        )
    return rows.batch(num_rows).map(finish)


class _Pieces(grain.experimental.FlatMapTransform):
    """The records of a block one by one, cut to pieces that fit a row (None: uncut)."""

    max_fan_out = 1  # read by flat maps over MapDatasets only

    def __init__(self, longest: int | None):
        self.longest = longest

    def flat_map(self, element: list[Pairs]) -> list[dict[str, Pairs]]:
        if self.longest is None:
            return [{_FEATURE: pairs} for pairs in element if len(pairs)]
        step = self.longest
        return [{_FEATURE: pairs[at : at + step]} for pairs in element for at in range(0, len(pairs), step)]


@dataclasses.dataclass(frozen=True)
class _OneEach:
    """A row per record, in the shape that Grain's packers give."""

    sequence_length: int

    def __call__(self, records: list[Pairs]) -> dict[str, np.ndarray]:
        pairs = np.zeros((len(records), self.sequence_length, 3), np.int32)
        lengths = np.array([min(len(record), self.sequence_length) for record in records])
        for row, record, length in zip(pairs, records, lengths, strict=True):
            row[:length] = record[:length]
        places = np.arange(self.sequence_length, dtype=np.int32)
        filled = places < lengths[:, None]
        return {
            _FEATURE: pairs,
            f"{_FEATURE}_segment_ids": filled.astype(np.int32),
            f"{_FEATURE}_positions": places * filled,
        }


@dataclasses.dataclass(frozen=True)
class _Finish:
    """Names the columns, and adds the rows that a last batch lacks."""

    num_rows: int
    document_mask: bool
    with_sources: bool

    def __call__(self, packed: dict[str, np.ndarray]) -> Batch:
        pairs, segments, positions = (packed[_FEATURE + name] for name in ("", "_segment_ids", "_positions"))
        if not self.document_mask:
            segments = (segments > 0).astype(np.int32)
            # Padding makes no row longer, on whose length rotary frequencies may depend.
            positions = np.arange(segments.shape[1], dtype=np.int32) * segments
        batch = {
            "tokens": pairs[:, :, 0],
            "targets": pairs[:, :, 1],
            "segments": segments,
            "positions": positions,
            "loss_mask": (pairs[:, :, 2] & 1).astype(np.float32),
        }
        if self.with_sources:
            batch["sources"] = pairs[:, :, 2] >> 1
        if not (missing := self.num_rows - len(pairs)):
            return batch
        return {name: np.pad(rows, ((0, missing), (0, 0))) for name, rows in batch.items()}
