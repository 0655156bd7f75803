"""Which prompt each row of a cache holds, so that a prompt with a common prefix need not be prefilled whole."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memjax.inference.programs import extended_sizes, padded_length
from memjax.inference.requests import Request


class Joining(NamedTuple):
    """A prompt to prefill into a row."""

    request: Request
    slot: int
    source: int = 0
    """The row whose prompt shares a prefix with this one."""
    start: int = 0
    """Length of the shared prefix, which is copied; 0: the whole prompt is processed."""
    size: int = 0
    """Columns of the cache to copy, which hold the whole prompt; 0 without a shared prefix."""
    width: int = 0
    """Tokens to process, padded."""


class Prompts:
    """The last prompt written into each row; generated tokens are not tracked."""

    def __init__(self, num_rows: int, capacity: int):
        """Makes room for `capacity` tokens per row; longer prompts are not tracked."""
        self.is_used = False
        """Whether prefixes are reused."""
        self._sizes = extended_sizes(capacity)
        self._tokens = np.full((num_rows, capacity), -1, np.int32)
        self._order = np.zeros(num_rows, np.int64)

    def clear(self) -> None:
        """Forgets all prompts."""
        self._tokens[:] = -1

    def put(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Records that a row holds a prompt."""
        self._tokens[row] = -1
        if len(prompt_ids) <= self._tokens.shape[1]:
            self._tokens[row, : len(prompt_ids)] = prompt_ids
        self._order[row] = self._order.max() + 1

    def joining(self, request: Request, slot: int) -> Joining:
        """A request for a slot, with the row that shares its longest prefix, if reusing it shortens the padded prefill.

        The last token is always processed, because its logits are needed.
        """
        length = len(request.prompt_ids)
        all_, count = Joining(request, slot, width=padded_length(length)), length - 1
        if not self.is_used or not 0 < count < self._tokens.shape[1]:
            return all_
        is_other = self._tokens[:, :count] != np.asarray(request.prompt_ids[:count], np.int32)
        shared = np.where(is_other.any(axis=1), is_other.argmax(axis=1), count)
        source = int(shared.argmax())
        start = int(shared[source])
        fitting = [pair for pair in self._sizes if pair[0] >= length and pair[1] >= length - start]
        size, width = min(fitting, default=(0, all_.width))
        return Joining(request, slot, source, start, size, width) if width < all_.width else all_

    def by_age(self, rows: Sequence[int]) -> list[int]:
        """The given rows in the order in which to overwrite them: those with the oldest prompts first."""
        return sorted(rows, key=lambda row: self._order[row] if self.is_used else row)
