"""How the sequences of log-likelihoods are arranged in few batches, with tokens that they share computed once."""

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from memjax.data.packing import Batch
from memjax.inference.programs import padded_length
from memjax.models.dot_product import SEEN_BY_ALL
from memjax.sharding.axes import has_memory_axis

_FEW = 16
"""Predictions for which all rows have room, at least; wide ones have it for a quarter of their tokens, or for all."""
_WIDEST = 4096
"""Tokens of the longest row that several sequences share, as attention's mask of it is a square."""


class ScoreRequest(NamedTuple):
    """A continuation to score, and the context it follows, as token ids."""

    context: Sequence[int]
    """Must not be empty: at least the begin token."""
    continuation: Sequence[int]
    """May be empty (probability 1)."""


class Row:
    """A sequence of input tokens, and the predictions scored in it."""

    def __init__(self, tokens: tuple[int, ...]):
        self.tokens = tokens
        self.asks: list[tuple[int, tuple[int, ...]]] = []
        """Request index and target tokens; the last target follows the last token of the row."""

    @property
    def depth(self) -> int:
        """Number of predictions."""
        return sum(len(targets) for _, targets in self.asks)


class Shape(NamedTuple):
    """Padded numbers of tokens and predictions of a batch's rows, and whether some hold several sequences."""

    width: int
    depth: int
    is_shared: bool

    def num_rows(self, batch_size: int, count: int) -> int:
        """Rows per batch of `count` packs; of shared ones, which may be twice as wide, half as many, evenly split."""
        if not self.is_shared:
            return batch_size
        devices = jax.sharding.get_abstract_mesh().size if has_memory_axis() else 1
        most = -(-batch_size // (2 * devices)) * devices
        return -(-count // (-(-count // most) * devices)) * devices


class Pack:
    """Sequences that share their first tokens, in one row: these tokens, then the rest of each."""

    def __init__(self, row: Row):
        self.rows = [row]
        self.shared = self.length = len(row.tokens)
        self.depth = row.depth

    def add(self, row: Row) -> bool:
        """Adds a sequence if more than half of each is shared and all fit into twice the width of one; False if not."""
        size, shared = len(row.tokens), min(self.shared, num_shared(self.rows[0].tokens, row.tokens))
        length = self.length + (len(self.rows) - 1) * (self.shared - shared) + size - shared
        longest = max(size, *(len(one.tokens) for one in self.rows))
        fits = length <= min(2 * padded_length(longest), _WIDEST) and self.depth + row.depth <= max(_FEW, length)
        if 2 * shared <= longest or not fits:
            return False
        self.rows.append(row)
        self.shared, self.length, self.depth = shared, length, self.depth + row.depth
        return True

    @property
    def shape(self) -> Shape:
        """The smallest shape of a batch for it; there are two programs per width."""
        width = padded_length(self.length)
        few = max(_FEW, width // 4)
        return Shape(width, few if self.depth <= few else width, len(self.rows) > 1)

    def write(self, batch: Batch, number: int) -> None:
        """Writes the tokens and predictions to a row of a batch."""
        start, asked = self.shared, 0
        for index, row in enumerate(self.rows):
            first = 0 if index == 0 else self.shared
            places = np.arange(len(row.tokens))
            places[self.shared :] += start - self.shared
            new = places[first:]
            batch["tokens"][number, new] = row.tokens[first:]
            batch["token_mask"][number, new] = True
            batch["positions"][number, new] = np.arange(first, len(row.tokens))
            batch["segments"][number, places[self.shared :]] = index
            start += len(row.tokens) - self.shared
            for _, targets in row.asks:
                some = slice(asked, asked := asked + len(targets))
                batch["predicted"][number, some] = places[len(places) - len(targets) :]
                batch["targets"][number, some] = targets

    def owners(self) -> Iterator[tuple[int, slice]]:
        """Request indices, each with its slice of the row's predictions."""
        asks = [ask for row in self.rows for ask in row.asks]
        ends = itertools.accumulate(len(targets) for _, targets in asks)
        for (owner, targets), end in zip(asks, ends, strict=True):
            yield owner, slice(end - len(targets), end)


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def rows_of(requests: Iterable[ScoreRequest], max_length: int) -> list[Row]:
    """The sequences of at most max_length tokens that score the requests."""
    rows: list[Row] = []
    shared: dict[tuple[int, ...], Row] = {}
    for owner, (context, continuation) in enumerate(requests):
        if not len(context):
            raise ValueError(f"the context of request {owner} is empty; it needs at least the begin token")
        ids = (*context, *continuation)
        for start in range(len(context), len(ids), max_length):
            stop = min(start + max_length, len(ids))
            tokens, targets = ids[max(0, stop - 1 - max_length) : stop - 1], ids[start:stop]
            row = shared.get(tokens)
            if row is None or row.depth + len(targets) > _FEW:
                row = shared[tokens] = Row(tokens)
                rows.append(row)
            row.asks.append((owner, targets))
    return rows


def packed(rows: Iterable[Row], *, can_share: bool) -> list[Pack]:
    """The rows, those that begin alike together if that halves their padded length."""
    packs: list[Pack] = []
    for row in sorted(rows, key=lambda row: row.tokens):
        if not (can_share and packs and packs[-1].add(row)):
            packs.append(Pack(row))
    apart = lambda pack: sum(padded_length(len(row.tokens)) for row in pack.rows)
    return [one for pack in packs for one in ([pack] if 2 * pack.shape.width <= apart(pack) else map(Pack, pack.rows))]


def by_shape(packs: Iterable[Pack], batch_size: int) -> list[tuple[Shape, list[Pack]]]:
    """The packs grouped by padded shape, the smallest first.

    Groups that do not fill a batch join the next larger shape: compiling a program takes longer than computing a batch.
    """
    groups: dict[Shape, list[Pack]] = defaultdict(list)
    for pack in packs:
        groups[pack.shape].append(pack)
    for shape in sorted(groups):
        fits = lambda other, shape=shape: other > shape and all(map(operator.ge, other, shape))
        larger = next(filter(fits, sorted(groups)), None)
        if larger and len(groups[shape]) < batch_size // (2 if shape.is_shared else 1):
            groups[larger] += groups.pop(shape)
    return sorted(groups.items())


def batch_of(packs: Sequence[Pack], num_rows: int, shape: Shape) -> Batch:
    """Padded arrays: `tokens` with `token_mask`, and `targets`, each `predicted` at a place in its row.

    Rows of several sequences also need `positions` and `segments`.
    """
    wide = {"tokens": np.int32, "token_mask": bool, "positions": np.int32, "segments": np.int32}
    batch = {name: np.zeros((num_rows, shape.width), dtype) for name, dtype in wide.items()}
    batch |= {name: np.zeros((num_rows, shape.depth), np.int32) for name in ("predicted", "targets")}
    batch["segments"][:] = SEEN_BY_ALL
    for number, pack in enumerate(packs):
        pack.write(batch, number)
    if not shape.is_shared:
        del batch["positions"], batch["segments"]
    return batch
