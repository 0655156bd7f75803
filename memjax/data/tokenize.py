"""Records by number as token ids, from text that is tokenised as it is read, or from several readers as one."""

import bisect
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32

from memjax.data.sources.records import Record, Records
from memjax.data.tokenizers.base import Tokenizer

T = TypeVar("T")

Pairs = Int32[np.ndarray, "_ 3"]
"""Of one record: the tokens, their targets, and 1 where the target is learned plus twice the number of its part."""

_CACHED_CHARACTERS = 200
_CACHED_TEXTS = 100_000
_RECORDS_UNTIL_STOPPED = 16


class Reader(ABC):
    """Records by number, as pairs. Readers are picklable: worker processes get a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __call__(self, numbers: Sequence[int], rng: np.random.Generator) -> list[Pairs]:
        """The pairs of those records, in wordings from rng where there are several.

        Raises:
            DataError: a record cannot be used.
        """

    @abstractmethod
    def record(self, number: int) -> Record:
        """The text of a record."""

    def fingerprint(self) -> dict[str, Any] | None:
        """Identifies the records, as JSON values; None where the settings decide them."""
        return None


class TextReader(Reader):
    """Tokenises records as they are read."""

    def __init__(self, records: Records, tokenizer: Tokenizer, fingerprint: dict[str, Any] | None = None):
        self.records, self.tokenizer = records, tokenizer
        self._fingerprint = fingerprint
        # Generated data repeats its texts all the time; documents are too long to be worth remembering.
        self._known: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type["TextReader"], tuple[Any, ...]]:
        return TextReader, (self.records, self.tokenizer, self._fingerprint)

    def __len__(self) -> int:
        return len(self.records)

    def record(self, number: int) -> Record:
        return self.records[number]

    def fingerprint(self) -> dict[str, Any] | None:
        return self._fingerprint

    def __call__(self, numbers: Sequence[int], rng: np.random.Generator) -> list[Pairs]:
        records = [self.records.draw(number, rng) for number in numbers]
        if len(self._known) > _CACHED_TEXTS:
            self._known = {}
        known = self._known  # which the validation, in another thread, may replace meanwhile
        new = list({segment.text for record in records for segment in record if segment.text not in known})
        ids = dict(zip(new, self.tokenizer.encode_batch(new), strict=True))
        known.update((text, found) for text, found in ids.items() if len(text) <= _CACHED_CHARACTERS)
        find = lambda text: ids[text] if text in ids else known[text]
        return [pairs_of(record, [find(text) for text, _ in record], self.tokenizer) for record in records]


def pairs_of(record: Record, segments: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Pairs:
    """The pairs of a record from the ids of its segments."""
    tokens: list[int] = []
    learned: list[bool] = []
    for (_, is_learned), ids in zip(record, segments, strict=True):
        tokens += ids
        learned += [is_learned] * len(ids)
    # EOS belongs to the last segment.
    return make_pairs(tokens, [*learned, bool(record) and record[-1].learned], tokenizer)


def make_pairs(
    tokens: Sequence[int] | np.ndarray, learned: bool | Sequence[bool] | np.ndarray, tokenizer: Tokenizer
) -> Pairs:
    """The pairs of a record, with its begin and end token. `learned` has a flag for each token and the end, or is one
    for all.
    """
    pairs = np.empty((len(tokens) + 1, 3), np.int32)
    pairs[0, 0] = tokenizer.bos_id
    pairs[1:, 0] = tokens
    pairs[:-1, 1] = pairs[1:, 0]
    pairs[-1, 1] = tokenizer.eos_id
    pairs[:, 2] = learned
    return pairs


Read = Callable[[Sequence[int], np.random.Generator], list[Pairs]]
"""Gives the pairs of records by number, as a `Reader` does."""


def joined(readers: Sequence[Reader]) -> Read:
    """Reads the records of several, those of the first, then those of the second; pairs have the number of the part."""
    if len(readers) == 1:
        return readers[0]
    starts = [0, *itertools.accumulate(map(len, readers))]

    def read(numbers: Sequence[int], rng: np.random.Generator) -> list[Pairs]:
        def of_part(part: int, own_numbers: list[int]) -> list[Pairs]:
            found = readers[part](own_numbers, rng)
            for pairs in found:
                pairs[:, 2] |= part << 1
            return found

        return read_by_part(numbers, starts, of_part)

    return read


def stoppable(read: Read, stop: threading.Event) -> Read:
    """Reads a few records at a time, until it is stopped: a block of long ones takes seconds."""

    def some(numbers: Sequence[int], rng: np.random.Generator) -> list[Pairs]:
        found: list[Pairs] = []
        for at in range(0, len(numbers), _RECORDS_UNTIL_STOPPED):
            if stop.is_set():
                raise InterruptedError("the data was closed")
            found += read(numbers[at : at + _RECORDS_UNTIL_STOPPED], rng)
        return found

    return some


def read_by_part(
    numbers: Sequence[int], starts: Sequence[int], read: Callable[[int, list[int]], Sequence[T]]
) -> list[T]:
    """The records with these numbers, read from several parts. `starts` has the number of each part's first record,
    then the number of all records. `read` is called once for each part that has some of them, with the numbers that
    they have there.
    """
    owners = [bisect.bisect_right(starts, number) - 1 for number in numbers]
    found: dict[int, T] = {}
    for part in sorted(set(owners)):
        places = [place for place, owner in enumerate(owners) if owner == part]
        found |= zip(places, read(part, [numbers[place] - starts[part] for place in places]), strict=True)
    return [found[place] for place in range(len(numbers))]
