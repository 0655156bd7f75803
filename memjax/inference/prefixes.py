"""Prompts that the rows of a cache hold, so that another prompt need not have its beginning read again."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memjax.inference.programs import padded_length
from memjax.inference.requests import Request


class Joining(NamedTuple):
    """A prompt to read into a row."""

    request: Request
    slot: int
    source: int = 0
    """The row whose prompt begins like this one."""
    start: int = 0
    """How many of the first tokens are the same, and are copied; 0 to read all."""

    @property
    def width(self) -> int:
        """Tokens to read, padded."""
        return padded_length(len(self.request.prompt_ids) - self.start)


class Prompts:
    """The prompt that was written into each row last; what a text adds behind it does not count."""

    def __init__(self, num_rows: int, capacity: int):
        """Room for rows of so many tokens; longer prompts are not kept."""
        self.is_used = False
        """Whether beginnings are looked up."""
        self._tokens = np.full((num_rows, capacity), -1, np.int32)
        self._order = np.zeros(num_rows, np.int64)

    def clear(self) -> None:
        """Forgets all prompts, whose rows are gone."""
        self._tokens[:] = -1

    def put(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Notes that a row holds a prompt."""
        self._tokens[row] = -1
        if len(prompt_ids) <= self._tokens.shape[1]:
            self._tokens[row, : len(prompt_ids)] = prompt_ids
        self._order[row] = self._order.max() + 1

    def joining(self, request: Request, slot: int) -> Joining:
        """A request for a row, with the row that begins like its prompt for longest; none where no padding is saved.

        The last token is always left to be read: its logits are wanted.
        """
        all_, count = Joining(request, slot), len(request.prompt_ids) - 1
        if not self.is_used or not 0 < count < self._tokens.shape[1]:
            return all_
        is_other = self._tokens[:, :count] != np.asarray(request.prompt_ids[:count], np.int32)
        shared = np.where(is_other.any(axis=1), is_other.argmax(axis=1), count)
        source = int(shared.argmax())
        rest = all_._replace(source=source, start=int(shared[source]))
        return rest if rest.width < all_.width else all_

    def by_age(self, rows: Sequence[int]) -> list[int]:
        """Some rows in the order in which they may be overwritten: those with the oldest prompts first."""
        return sorted(rows, key=lambda row: self._order[row] if self.is_used else row)
