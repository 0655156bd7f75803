"""From records to batches: token ids, what follows each, what counts, and which record a place belongs to.

A record of n tokens (begin and end included) becomes n - 1 pairs of a token and the one to be predicted from it. Pairs
are what gets packed, so no pair is lost where a row ends and none joins the end of one record to the next one's begin.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset, FirstFitPackIterDataset, FlatMapIterDataset
from jaxtyping import Int32

from memjax.data.records import Record, Source
from memjax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""Arrays of shape [batch, sequence_length].

int32 `tokens` and `targets`; int32 `segments` (0 is padding, else the record's number in its row) and `positions`;
float32 `loss_mask` (1 where the target is learned, else 0).
"""

Pairs = Int32[np.ndarray, "_ 3"]
"""Of one record: the tokens, their targets, and 1 where the target is learned."""

_FEATURE = "pairs"
_NUM_BINS = 64
"""Rows that first_fit fills side by side; more waste less padding and come out in larger bursts."""
_BLOCK = 64
"""Records read and tokenised in one call; work per record is dear, Grain's own above all."""
_CACHED_LETTERS = 200
_CACHED_TEXTS = 100_000


class Reader:
    """Reads records by their numbers, as pairs."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self.source = source
        self.tokenizer = tokenizer
        # Generated data repeats its texts all the time; documents are too long to be worth remembering.
        self._known: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type["Reader"], tuple[Source, Tokenizer]]:
        return Reader, (self.source, self.tokenizer)

    def __call__(self, numbers: Sequence[int], rng: np.random.Generator) -> list[Pairs]:
        """The pairs of those records, in wordings from rng.

        Raises:
            DataError: a record cannot be used.
        """
        records = [self.source.draw(number, rng) for number in numbers]
        if len(self._known) > _CACHED_TEXTS:
            self._known = {}
        known = self._known
        new = list({segment.text for record in records for segment in record if segment.text not in known})
        ids = dict(zip(new, self.tokenizer.encode_batch(new), strict=True))
        known.update((text, found) for text, found in ids.items() if len(text) <= _CACHED_LETTERS)
        return [self._pairs(record, ids) for record in records]

    def _pairs(self, record: Record, ids: dict[str, list[int]]) -> Pairs:
        tokens = [self.tokenizer.bos_id]
        learned: list[bool] = []
        for text, is_learned in record:
            segment = ids[text] if text in ids else self._known[text]
            tokens += segment
            learned += [is_learned] * len(segment)
        pairs = np.empty((len(tokens), 3), np.int32)
        pairs[:, 0] = tokens
        pairs[:-1, 1] = tokens[1:]
        pairs[-1, 1] = self.tokenizer.eos_id
        pairs[:-1, 2] = learned
        # The end is a part of what was said last.
        pairs[-1, 2] = bool(record) and record[-1].learned
        return pairs


def batches(
    numbers: grain.MapDataset[int],
    source: Source,
    tokenizer: Tokenizer,
    *,
    packing: Literal["none", "concat", "first_fit"],
    sequence_length: int,
    num_rows: int,
    document_mask: bool,
    seed: int,
) -> grain.IterDataset[Batch]:
    """Batches of num_rows rows; a last one that records do not fill is padded with empty rows.

    Args:
        numbers: the numbers of the records, in the order in which they are to be seen.
        source: has the records.
        tokenizer: makes the ids.
        packing: none cuts a record at sequence_length pairs; the others cut it into rows, and lose nothing.
        sequence_length: pairs in a row.
        num_rows: rows in a batch.
        document_mask: number the records of a row and their positions, or treat a row as one text.
        seed: chooses the wordings of the records, and orders the rows that first_fit fills together.
    """
    finish = _Finish(num_rows=num_rows, document_mask=document_mask)
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    reader = Reader(source, tokenizer)
    if packing == "none":
        blocks = numbers.batch(num_rows, batch_fn=list).random_map(reader, seed=seed)
        return blocks.map(_OneEach(sequence_length)).map(finish).to_iter_dataset(read)
    blocks = numbers.batch(_BLOCK, batch_fn=list).random_map(reader, seed=seed).to_iter_dataset(read)
    pieces = FlatMapIterDataset(blocks, _Pieces(None if packing == "concat" else sequence_length))
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
            return [{_FEATURE: pairs} for pairs in element]
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

    def __call__(self, packed: dict[str, np.ndarray]) -> Batch:
        pairs, segments, positions = (packed[_FEATURE + name] for name in ("", "_segment_ids", "_positions"))
        if not self.document_mask:
            segments = (segments > 0).astype(np.int32)
            positions = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int32), segments.shape)
        batch = {
            "tokens": pairs[:, :, 0],
            "targets": pairs[:, :, 1],
            "segments": segments,
            "positions": positions,
            "loss_mask": pairs[:, :, 2].astype(np.float32),
        }
        missing = self.num_rows - len(pairs)
        return {name: np.pad(rows, ((0, missing), (0, 0))) for name, rows in batch.items()}


def take_rows(batch: Batch, process_index: int, process_count: int) -> Batch:
    """The rows of a batch that belong to one of several processes, in order."""
    num_rows = len(batch["tokens"]) // process_count
    return {name: rows[process_index * num_rows : (process_index + 1) * num_rows] for name, rows in batch.items()}
