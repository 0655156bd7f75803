"""What every source of text hands on: records, cut into segments that are learned or only read."""

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """A piece of a record's text, and whether the model is trained to write it."""

    text: str
    learned: bool


Record = tuple[Segment, ...]
"""One document, its segments in order."""


class Source(ABC):
    """Records by number. Sources are picklable: worker processes get a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The record of that number, always the same.

        Raises:
            IndexError: there is no such number.
            DataError: the record cannot be used.
        """

    def draw(self, index: int, rng: np.random.Generator) -> Record:
        """The record as one exposure shows it; sources that vary their wording take it from rng."""
        del rng  # most sources have one wording
        return self[index]


class Part(Source):
    """The records start..stop - 1 of another source."""

    def __init__(self, source: Source, start: int, stop: int):
        self.source = source
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Record:
        return self.source[self.start + checked(index, len(self))]

    def draw(self, index: int, rng: np.random.Generator) -> Record:
        """The record as the whole source would draw it."""
        return self.source.draw(self.start + checked(index, len(self)), rng)


class Chain(Source):
    """The records of several sources, those of the first, then those of the second."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self._starts = [0, *itertools.accumulate(map(len, self.sources))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        owner = bisect.bisect_right(self._starts, checked(index, len(self))) - 1
        return self.sources[owner][index - self._starts[owner]]


def checked(index: int, length: int) -> int:
    """The index itself.

    Raises:
        IndexError: it is not in 0..length - 1.
    """
    if not 0 <= index < length:
        raise IndexError(f"record {index} of a source of {length} records")
    return index
