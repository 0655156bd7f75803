"""Packs records into batches of tokens, targets, loss masks, segments and positions.

A record of n tokens (BOS and EOS included) becomes n - 1 pairs of a token and its target. Pairs are what is packed, so
none is lost at the end of a row, and none joins the end of one record to the start of the next.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import grain
import numpy as np

from memjax.data.mixture import Order
from memjax.data.packers import Concat, FirstFit, Rows
from memjax.data.tokenize import Block, Read

Batch = dict[str, np.ndarray]
"""Arrays of shape [batch, sequence_length].

int32 `tokens` and `targets`; int32 `segments` (0 is padding, else the record's number in its row) and `positions`;
float32 `loss_mask` (1 where the target is learned, else 0). For mixtures also int32 `sources`, the index of the part.
"""

_BLOCK = 64
"""Records read and tokenised in one call."""


def batches(
    numbers: Order | range,
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
    """Batches of num_rows rows, from the records in the order of `numbers`; empty rows pad the last batch.

    Packing "none" truncates records to sequence_length pairs; the others split them over rows and lose nothing. With
    document_mask each record of a row has its own segment and positions; otherwise a row is one text. The seed chooses
    the wordings of records, and orders the rows that first_fit fills together. One of several workers reads only the
    blocks of its `shard`.
    """
    size = num_rows if packing == "none" else _BLOCK
    blocks = grain.MapDataset.source(_Blocks(numbers, size))
    blocks = blocks.random_map(lambda some, rng: read(some.tolist(), rng), seed=seed)[shard]
    blocks = blocks.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    rows: grain.IterDataset[Rows]
    if packing == "none":
        rows = blocks.map(_OneEach(num_rows, sequence_length))
    elif packing == "concat":
        rows = _Packed(blocks, lambda records: Concat(records, num_rows, sequence_length))
    else:
        rows = _Packed(blocks, lambda records: FirstFit(records, num_rows, sequence_length, seed))
    return rows.map(_Finish(document_mask=document_mask, with_sources=with_sources))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Numbers of the records that are read together."""

    numbers: Order | range
    size: int

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.size)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.numbers[index * self.size : (index + 1) * self.size])


@dataclasses.dataclass(frozen=True)
class _OneEach:
    """Puts each record into its own row."""

    num_rows: int
    sequence_length: int

    def __call__(self, block: Block) -> Rows:
        rows = Rows.empty(self.num_rows, self.sequence_length)
        for row, record in zip(rows.pairs, block.split(), strict=False):
            row[: len(record)] = record[: self.sequence_length]
        places = np.arange(self.sequence_length, dtype=np.int32)
        rows.segments[: len(block.lengths)] = places < block.lengths[:, None]
        rows.positions[:] = places * rows.segments
        return rows


class _Packed(grain.IterDataset[Rows]):
    """Blocks packed by `pack`, which wraps an iterator over them."""

    def __init__(
        self, blocks: grain.IterDataset[Block], pack: Callable[[grain.DatasetIterator], grain.DatasetIterator]
    ):
        super().__init__(blocks)
        self._pack = pack

    def __iter__(self) -> grain.DatasetIterator[Rows]:
        return self._pack(iter(self._parent))


@dataclasses.dataclass(frozen=True)
class _Finish:
    """Turns rows into named arrays."""

    document_mask: bool
    with_sources: bool

    def __call__(self, rows: Rows) -> Batch:
        pairs, segments, positions = rows
        if not self.document_mask:
            segments = (segments > 0).astype(np.int32)
            # Padding must not lengthen a row: rotary frequencies may depend on its length.
            positions = np.arange(segments.shape[1], dtype=np.int32) * segments
        batch = {
            "tokens": pairs[:, :, 0],
            "targets": pairs[:, :, 1],
            "segments": segments,
            "positions": positions,
            "loss_mask": (pairs[:, :, 2] & 1).astype(np.float32),
        }
        return batch | ({"sources": pairs[:, :, 2] >> 1} if self.with_sources else {})
