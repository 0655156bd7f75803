"""Packs records into rows, whole blocks at a time with NumPy.

States have the format of Grain's own packers, `ConcatThenSplitIterDataset` and `FirstFitPackIterDataset` over a flat
map, which process records one by one and are several times slower for short ones.
"""

from collections import deque
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32

from memjax.data.tokenize import Block, edges

_NUM_BINS = 64
"""Rows that first_fit fills in parallel; more of them leave less padding but are produced in larger bursts."""

State = dict[str, Any]


class Rows(NamedTuple):
    """Packed rows; padding is 0 in all arrays."""

    pairs: Int32[np.ndarray, "rows length 3"]
    segments: Int32[np.ndarray, "rows length"]
    positions: Int32[np.ndarray, "rows length"]

    @staticmethod
    def empty(num_rows: int, length: int) -> "Rows":
        """Rows of padding only."""
        shape = (num_rows, length)
        return Rows(np.zeros((*shape, 3), np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32))


class _Pieces:
    """The pieces of blocks still to be packed, and the place of each: the state from which to read its block, and its
    index within the block.
    """

    def __init__(self, blocks: grain.DatasetIterator[Block], longest: int | None = None):
        """Cuts records into pieces of at most `longest` pairs, if given."""
        self._blocks, self._longest = blocks, longest
        self.go_to({"parent": blocks.get_state(), "next_index_in_buffer": 0})

    def go_to(self, place: State) -> None:
        """Continues with the piece at a place."""
        self._blocks.set_state(place["parent"])
        self._end, self._num_done = place, place["next_index_in_buffer"]
        self.pairs = np.zeros((0, 3), np.int32)
        self.lengths = np.zeros(0, np.int64)
        self.places: deque[State] = deque()

    def fill(self, num_pairs: int) -> None:
        """Reads blocks until num_pairs pairs are buffered, or there are no more records."""
        pairs, lengths, count = [self.pairs], [self.lengths], len(self.pairs)
        while count < num_pairs:
            state = self._blocks.get_state()
            block = next(self._blocks, None)
            if block is None:
                break
            found = self._cut(block.lengths[block.lengths > 0])
            done, self._num_done = self._num_done, 0
            pairs.append(block.pairs[found[:done].sum() :])
            lengths.append(found[done:])
            count += len(pairs[-1])
            if len(found) > done:
                # The place of a block's first piece is the end of the block before.
                numbers = range(done + 1, len(found) + 1)
                self.places.append(self._end)
                self.places.extend({"parent": state, "next_index_in_buffer": number} for number in numbers)
                self._end = self.places.pop()
        if len(pairs) > 1:
            self.pairs, self.lengths = np.concatenate(pairs), np.concatenate(lengths)

    def drop(self, count: int, num_pairs: int) -> None:
        """Removes the first `count` pieces, which have been packed and hold num_pairs pairs."""
        self.pairs, self.lengths = self.pairs[num_pairs:], self.lengths[count:]
        for _ in range(count):
            self.places.popleft()

    def next_place(self) -> State:
        """The place of the next piece."""
        return self.places[0] if self.places else self._end

    def _cut(self, lengths: np.ndarray) -> np.ndarray:
        if self._longest is None:
            return lengths
        counts = -(-lengths // self._longest)
        pieces = np.full(counts.sum(), self._longest)
        pieces[np.cumsum(counts) - 1] = lengths - (counts - 1) * self._longest
        return pieces


class Concat(grain.DatasetIterator[Rows]):
    """All records end to end. A state names the place where the last returned row begins, and says to skip that row; if
    the row begins inside a record, it holds the bounds of the record's remainder.
    """

    def __init__(self, blocks: grain.DatasetIterator[Block], num_rows: int, sequence_length: int):
        super().__init__(blocks)
        self._num_rows, self._sequence_length = num_rows, sequence_length
        self._pieces = _Pieces(blocks)
        self._begun = 0
        """Pairs of the first piece that are in rows returned earlier."""
        self._state = self._state_at(self._pieces.next_place(), 0, 0, rows_given=0)

    def __next__(self) -> Rows:
        return self._take(self._num_rows)

    def _take(self, num_rows: int) -> Rows:
        pieces, length = self._pieces, self._sequence_length
        pieces.fill(num_rows * length)
        if not len(pieces.pairs):
            raise StopIteration
        count = min(num_rows * length, len(pieces.pairs))
        starts = edges(pieces.lengths) - self._begun
        rows = Rows.empty(num_rows, length)
        rows.pairs.reshape(-1, 3)[:count] = pieces.pairs[:count]
        begins = np.zeros(num_rows * length, bool)
        begins[starts[(starts > 0) & (starts < count)]] = True
        begins[::length] = True
        places = np.arange(count, dtype=np.int32)
        rows.positions.reshape(-1)[:count] = places - np.maximum.accumulate(places * begins[:count])
        rows.segments[:] = np.cumsum(begins.reshape(num_rows, length), axis=1)
        rows.segments.reshape(-1)[count:] = 0
        last_row = (count - 1) // length * length
        number = np.searchsorted(starts, last_row, side="right") - 1
        offset = int(last_row - starts[number])
        self._state = self._state_at(pieces.places[number], offset, int(pieces.lengths[number]), rows_given=1)
        num_done = int(np.searchsorted(starts, count, side="right")) - 1
        self._begun = int(count - starts[num_done])
        pieces.drop(num_done, count)
        return rows

    @staticmethod
    def _state_at(place: State, offset: int, length: int, rows_given: int) -> State:
        return {
            "parent_state": place,
            "remainder_slices": {"pairs": (offset, length) if offset else (-1, -1)},
            "elements_from_buffer_after_checkpoint": rows_given,
        }

    def get_state(self) -> State:
        return self._state

    def set_state(self, state: State) -> None:
        self._state, pieces = state, self._pieces
        pieces.go_to(state["parent_state"])
        self._begun = max(0, state["remainder_slices"]["pairs"][0])
        pieces.fill(self._begun + 1)
        pieces.drop(0, self._begun)
        if num_rows := state["elements_from_buffer_after_checkpoint"]:
            self._take(num_rows)


class FirstFit(grain.DatasetIterator[Rows]):
    """Puts each piece into the first of several rows with room for it, until a piece fits nowhere; these rows are then
    returned in random order. A state names the place of their first piece, and how many of them have been returned.
    """

    def __init__(self, blocks: grain.DatasetIterator[Block], num_rows: int, sequence_length: int, seed: int):
        super().__init__(blocks)
        self._num_rows, self._sequence_length, self._seed = num_rows, sequence_length, seed
        self._pieces = _Pieces(blocks, sequence_length)
        self._start(self._pieces.next_place(), next_row=0, counter=0)

    def _start(self, place: State, *, next_row: int, counter: int) -> None:
        self._place, self._next_row, self._counter = place, next_row, counter
        self._rows: Rows | None = None

    def __next__(self) -> Rows:
        found, count = Rows.empty(self._num_rows, self._sequence_length), 0
        while count < self._num_rows:
            rows = self._rows = self._rows or self._filled()
            if rows is None:
                break
            some = min(self._num_rows - count, len(rows.pairs) - self._next_row)
            for to, of in zip(found, rows, strict=True):
                to[count : count + some] = of[self._next_row : self._next_row + some]
            count, self._next_row, self._counter = count + some, self._next_row + some, self._counter + some
            if self._next_row == len(rows.pairs):
                self._start(self._pieces.next_place(), next_row=0, counter=self._counter)
        if not count:
            raise StopIteration
        return found

    def _filled(self) -> Rows | None:
        """Rows of the next pieces, in the order in which they are returned; None if there are no pieces."""
        pieces, length = self._pieces, self._sequence_length
        pieces.fill(_NUM_BINS * length + 1)  # more than fit
        if not pieces.places:
            return None
        room, used = np.full(_NUM_BINS, length), [0] * _NUM_BINS
        starts, numbers = [], []
        for size in pieces.lengths[: _NUM_BINS * length].tolist():  # no more can fit
            has_room = room >= size
            row = int(has_room.argmax())
            if not has_room[row]:
                break
            used[row] += 1
            numbers.append(used[row])
            starts.append((row + 1) * length - room[row])
            room[row] -= size
        lengths = pieces.lengths[: len(starts)]
        positions = np.arange(lengths.sum()) - np.repeat(edges(lengths)[:-1], lengths)
        places = np.repeat(starts, lengths) + positions
        rows = Rows.empty(_NUM_BINS - used.count(0), length)
        rows.pairs.reshape(-1, 3)[places] = pieces.pairs[: len(places)]
        rows.segments.reshape(-1)[places] = np.repeat(numbers, lengths)
        rows.positions.reshape(-1)[places] = positions
        pieces.drop(len(starts), len(places))
        rng = np.random.default_rng(self._seed + self._counter - self._next_row)
        order = rng.permuted(range(len(rows.pairs)))
        return Rows(*(array[order] for array in rows))

    def get_state(self) -> State:
        return {"parent": self._place, "next_row": self._next_row, "counter": self._counter}

    def set_state(self, state: State) -> None:
        self._pieces.go_to(state["parent"])
        self._start(state["parent"], next_row=state["next_row"], counter=state["counter"])
