"""Records: texts split into segments that are learned or serve as context only."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """A piece of a record's text, and whether it counts in the loss."""

    text: str
    learned: bool


Record = tuple[Segment, ...]
"""One document, its segments in order."""


def text_of(record: Record) -> str:
    """The whole text of a record."""
    return "".join(segment.text for segment in record)


class Records(ABC):
    """Records by number. They are picklable: worker processes get a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The record of that number, always in the same wording.

        Raises:
            IndexError: there is no such record.
            DataError: the record cannot be used.
        """

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def draw(self, index: int, rng: np.random.Generator) -> Record:
        """The record for one exposure; rng chooses among several wordings."""
        del rng  # most records have one wording
        return self[index]


def checked(index: int, length: int) -> int:
    """Returns the index; IndexError if it is not in 0..length - 1."""
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length} records")
    return index
