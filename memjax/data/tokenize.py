"""Records by number as token ids, tokenised as they are read, or from several readers joined into one."""

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Integer, Shaped

from memjax.data.sources.records import Record, Records
from memjax.data.tokenizers.base import Tokenizer

Pairs = Int32[np.ndarray, "_ 3"]
"""Columns: token, target, and 1 if the target is learned, plus twice the index of the record's part."""

_CACHED_CHARACTERS = 200
_CACHED_TEXTS = 100_000
_FIRST_RECORDS = 16
_PAIRS_UNTIL_STOPPED = 1 << 18


class Block(NamedTuple):
    """The pairs of several records, end to end: one array per record is expensive for short records."""

    pairs: Pairs
    lengths: Int[np.ndarray, " records"]
    """Pairs of each record; 0 for a skipped one."""

    def split(self) -> list[Pairs]:
        """The pairs of each record."""
        return [self.pairs[start:stop] for start, stop in itertools.pairwise(edges(self.lengths).tolist())]


def make_block(
    ids: Integer[np.ndarray, " ids"],
    lengths: Int[np.ndarray, " segments"],
    learned: Shaped[np.ndarray, " segments"],
    num_segments: Int[np.ndarray, " records"],
    tokenizer: Tokenizer,
) -> Block:
    """The pairs of records, from the ids of all their segments end to end, with BOS and EOS tokens added.

    A record without segments has no pairs.
    """
    ends = np.cumsum(num_segments)
    num_ids = np.diff(edges(lengths)[edges(num_segments)])
    is_there = num_segments > 0
    stops = np.cumsum(num_ids)[is_there]
    targets_of_segment = lengths.astype(np.int64)
    targets_of_segment[ends[is_there] - 1] += 1  # EOS belongs to the last segment
    pairs = np.empty((len(ids) + len(stops), 3), np.int32)
    pairs[:, 0] = np.insert(ids, stops - num_ids[is_there], tokenizer.bos_id)
    pairs[:, 1] = np.insert(ids, stops, tokenizer.eos_id)
    pairs[:, 2] = np.repeat(learned, targets_of_segment)
    return Block(pairs, num_ids + is_there)


def encoded_block(records: Sequence[Record], ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Block:
    """The pairs of records from the ids of all their segments."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return make_block(
        np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum()),
        lengths,
        np.array([segment.learned for record in records for segment in record], bool),
        np.fromiter(map(len, records), np.int64, len(records)),
        tokenizer,
    )


def edges(lengths: np.ndarray) -> np.ndarray:
    """Start offsets of pieces that lie end to end, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class Reader(ABC):
    """Records by number, as pairs. Readers are picklable: worker processes get a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __call__(self, numbers: Sequence[int], rng: np.random.Generator) -> Block:
        """Reads records by number; rng chooses among several wordings.

        Raises:
            DataError: a record cannot be used.
        """

    @abstractmethod
    def record(self, number: int) -> Record:
        """The text of a record."""

    def fingerprint(self) -> dict[str, Any] | None:
        """Identifies the records, as JSON values; None if the settings determine them."""
        return None


class TextReader(Reader):
    """Tokenises records as they are read."""

    def __init__(self, records: Records, tokenizer: Tokenizer, fingerprint: dict[str, Any] | None = None):
        self.records, self.tokenizer = records, tokenizer
        self._fingerprint = fingerprint
        # Generated data repeats its texts constantly; documents are too long to be worth caching.
        self._known: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type["TextReader"], tuple[Any, ...]]:
        return TextReader, (self.records, self.tokenizer, self._fingerprint)

    def __len__(self) -> int:
        return len(self.records)

    def record(self, number: int) -> Record:
        return self.records[number]

    def fingerprint(self) -> dict[str, Any] | None:
        return self._fingerprint

    def __call__(self, numbers: Sequence[int], rng: np.random.Generator) -> Block:
        records = [self.records.draw(number, rng) for number in numbers]
        texts = [segment.text for record in records for segment in record]
        if len(self._known) > _CACHED_TEXTS:
            self._known = {}
        known = self._known  # validation, in another thread, may replace it meanwhile
        new = list({text for text in texts if text not in known})
        ids = dict(zip(new, self.tokenizer.encode_batch(new), strict=True))
        known.update((text, found) for text, found in ids.items() if len(text) <= _CACHED_CHARACTERS)
        found = [ids[text] if text in ids else known[text] for text in texts]
        return encoded_block(records, found, self.tokenizer)


Read = Callable[[Sequence[int], np.random.Generator], Block]
"""Reads records by number, as a `Reader` does."""


def joined(readers: Sequence[Reader]) -> Read:
    """Concatenates readers; the third column of the pairs holds the index of the part."""
    if len(readers) == 1:
        return readers[0]
    starts = [0, *itertools.accumulate(map(len, readers))]

    def read(numbers: Sequence[int], rng: np.random.Generator) -> Block:
        records: list[Any] = [None] * len(numbers)
        for part, places, own_numbers in by_part(numbers, starts):
            block = readers[part](own_numbers, rng)
            block.pairs[:, 2] |= part << 1
            for place, pairs in zip(places.tolist(), block.split(), strict=True):
                records[place] = pairs
        return Block(np.concatenate(records), np.fromiter(map(len, records), np.int64, len(records)))

    return read


def stoppable(read: Read, stop: threading.Event) -> Read:
    """Reads few long or many short records at a time, so that it stops soon: a block of long ones takes seconds."""
    size = _FIRST_RECORDS

    def some(numbers: Sequence[int], rng: np.random.Generator) -> Block:
        nonlocal size
        found, at = [], 0
        while at < len(numbers):
            if stop.is_set():
                raise InterruptedError("the data was closed")
            found.append(read(numbers[at : at + size], rng))
            at += size
            size = 1 + _PAIRS_UNTIL_STOPPED * len(found[-1].lengths) // (1 + len(found[-1].pairs))
        return _end_to_end(found)

    return some


def _end_to_end(blocks: Sequence[Block]) -> Block:
    pairs, lengths = zip(*blocks, strict=True)
    return Block(np.concatenate(pairs), np.concatenate(lengths))


def by_part(
    numbers: Sequence[int], starts: Sequence[int]
) -> Iterator[tuple[int, Int[np.ndarray, " records"], list[int]]]:
    """Groups record numbers by part: yields the index of each part that holds any, the places of its records in
    `numbers`, and their numbers within the part. `starts` holds the first number of each part, then the total.
    """
    wanted = np.asarray(numbers)
    owners = np.searchsorted(starts, wanted, side="right") - 1
    for part in np.unique(owners).tolist():
        places = np.flatnonzero(owners == part)
        yield part, places, (wanted[places] - starts[part]).tolist()
