"""Training and validation splits of readers, mixed by weight into one order of records."""

import bisect
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from memjax.data.prepared.store import Manifest, PreparedReader
from memjax.data.sources.records import Record, Records, checked
from memjax.data.tokenize import Reader, TextReader
from memjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Records start..stop - 1 of a reader."""

    reader: Reader
    start: int
    stop: int
    weight: float = 1.0
    """Weight of its tokens among those of all splits."""

    @classmethod
    def of(cls, reader: Reader) -> "Split":
        """All records of a reader."""
        return cls(reader=reader, start=0, stop=len(reader))

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of prepared data; None for other readers."""
        return self.reader.manifest if isinstance(self.reader, PreparedReader) else None

    @property
    def record_weight(self) -> float:
        """Weight of its records among those of all splits: fewer of them are needed if they are longer."""
        manifest = self.manifest
        return self.weight if manifest is None else self.weight * manifest.records / manifest.tokens


class SplitRecords(Records):
    """The records of splits as text, one split after the other."""

    def __init__(self, splits: Sequence[Split]):
        self._splits = tuple(splits)
        self._starts = [0, *itertools.accumulate(split.stop - split.start for split in splits)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        reader, number = self._find(index)
        return reader.record(number)

    def draw(self, index: int, rng: np.random.Generator) -> Record:
        """The record in one of its wordings; prepared data has only one."""
        reader, number = self._find(index)
        return reader.records.draw(number, rng) if isinstance(reader, TextReader) else reader.record(number)

    def _find(self, index: int) -> tuple[Reader, int]:
        part = bisect.bisect_right(self._starts, checked(index, len(self))) - 1
        split = self._splits[part]
        return split.reader, split.start + index - self._starts[part]


def num_training_records(count: int, validation_fraction: float, path: str) -> int:
    """How many records, from the first, are for training; the rest are held out.

    Raises:
        DataError: there are too few to split.
    """
    if validation_fraction == 0:
        return count
    if count < 2:
        raise DataError(
            f"{path}: one record cannot be split into training and validation; "
            "set data.validation_path, or data.validation_fraction=0 for no validation"
        )
    return count - min(max(1, round(count * validation_fraction)), count - 1)


class Order:
    """Record numbers in training order, numbered as in `joined`.

    Each split is reshuffled every epoch, or read in file order. Without `repeat` the sequence ends as soon as one split
    does. The order is that of Grain's `shuffle`, `repeat` and `mix`, which return one number at a time and take longer
    for it than reading a short record.
    """

    def __init__(self, splits: Sequence[Split], *, seed: int, shuffle: bool, repeat: bool):
        self._shuffle = shuffle
        firsts = itertools.accumulate((len(split.reader) for split in splits), initial=0)
        self._parts = [
            _Part(first + split.start, split.stop - split.start, _derived((seed + number) % 2**32))
            for number, (first, split) in enumerate(zip(firsts, splits, strict=False))
        ]
        weights = [split.record_weight for split in splits]
        self._shares = [int(weight * (100 / min(weights))) for weight in weights]
        ends = [part.size / (share / sum(self._shares)) for part, share in zip(self._parts, self._shares, strict=True)]
        self._length = sys.maxsize if repeat else int(min(ends))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: slice) -> np.ndarray:
        start, stop, _ = places.indices(len(self))
        found = np.empty(stop - start, np.int64)
        # For each place, how many earlier numbers belong to this part or a later one; Python integers, because the
        # products may overflow 64 bits.
        before, shares = list(range(start, stop + 1)), sum(self._shares)
        for part, share in zip(self._parts, self._shares, strict=True):
            rest = shares - share
            later = [count * rest // shares for count in before]
            own = np.subtract(before, later)
            found[np.flatnonzero(np.diff(own))] = part.numbers(int(own[0]), int(own[-1]), self._shuffle)
            before, shares = later, rest
        return found


class _Part(NamedTuple):
    """A split as part of an order."""

    first: int
    size: int
    seed: int

    def numbers(self, start: int, stop: int, shuffle: bool) -> list[int]:
        """The record numbers at places start..stop - 1 of all epochs end to end."""
        epochs = (divmod(place, self.size) for place in range(start, stop))
        if not shuffle:
            return [self.first + place for _, place in epochs]
        last = self.size - 1
        return [self.first + index_shuffle(place, last, (self.seed + epoch) % 2**32, 4) for epoch, place in epochs]


def _derived(seed: int) -> int:
    """The seed that Grain's `seed(seed).shuffle()` uses."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
