"""The generation engine: slots for several texts, batched prefill, many decoding steps per call."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.stages import Wrapped
from jaxtyping import Int

from memjax.config import checks
from memjax.inference import programs
from memjax.inference.prefixes import Joining, Prompts
from memjax.inference.programs import (
    LONGEST_CHUNK,
    NOTHING,
    STOPPED,
    Room,
    Rows,
    State,
    padded_length,
    programs_of,
    top_count,
)
from memjax.inference.requests import Made, Request, TokenLogprobs, check
from memjax.inference.sampling import Likelihoods, Mode
from memjax.inference.weights import prepare
from memjax.models.decoder import Decoder
from memjax.ops.tiles import next_power_of_two
from memjax.sharding.axes import has_memory_axis

_PREFILL_TOKENS = 1 << 15
"""Prompt tokens, padding included, that are read at once: it bounds the activations. A longer prompt is read alone."""
_FEW_TOKENS = 64
"""Prompt tokens up to which compiling takes longer than running what was compiled well."""
_AT_ONCE = 1024
"""Caches up to this capacity are allocated for the longest text that may come, larger ones grow with the texts."""


@dataclasses.dataclass(slots=True)
class _Slot:
    """A text in the making."""

    request: Request
    num_reused: int = 0
    num_made: int = 0

    def capacity(self, count: int) -> int:
        """Cache capacity for the text with `count` more tokens, or with all of max_tokens where that is small."""
        start = len(self.request.prompt_ids)
        longest = start + self.request.max_tokens
        soon = min(longest, start + max(1, self.num_made) + count)
        return padded_length(max(soon, min(longest, _AT_ONCE)))


@dataclasses.dataclass(slots=True)
class _Fresh:
    """Prompts that were read together; a row each."""

    slots: dict[int, _Slot]
    """Slots of the first rows, in their order."""
    state: State
    tokens: Int[jax.Array, "b 1"]
    likelihoods: Likelihoods | None


class Engine:
    """Writes several texts at a time; requests join and leave while others are being written::

        engine = Engine(model, num_slots=8)
        (slot,) = engine.insert([Request(prompt_ids=ids, max_tokens=100)])
        while engine.is_busy:
            for slot, made in engine.step(16).items():
                print(slot, made.tokens, made.finish)

    A text's tokens are those that it gets alone, whatever is written beside it: a row has positions of its own and sees
    no other, and draws depend on the seed, the prompt's number and the step. (Groups of prompts of different sizes are
    read by different programs, whose sums can be rounded differently: it decides between two tokens that are equally
    likely to the last digits.)

    Under a mesh, slots are split over its devices, as the batch of the training is.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_slots: int,
        prefill_rows: int | None = None,
        min_capacity: int = 0,
        modes: Sequence[Mode] = (),
    ):
        """Prepares the weights (`weights.prepare`); the cache is allocated when it is needed.

        Args:
            model: the model; the engine sees no change made to it later.
            num_slots: texts at a time.
            prefill_rows: prompts that are read together, missing ones padded; None takes powers of two.
            min_capacity: tokens of each text that the cache has room for at least; texts up to this length share one
                decoding program.
            modes: what to compile for, the narrowest first: a batch runs in the first that covers its needs. Without
                one that does, a program for exactly these needs is compiled.
        """
        checks.refuse([*checks.counts(num_slots=num_slots), *_rows_wrong(prefill_rows)])
        self.num_slots = num_slots
        self._config, self._prefill_rows = model.config, prefill_rows
        self.vocab_size = model.config.vocab_size
        self._min_capacity, self._modes = min_capacity, tuple(modes)
        _, graphdef, structure, self._weights = prepare(model)
        self._programs = programs_of(graphdef, structure)
        # A mesh splits rows over its devices, so each needs as many as the others; the excess rows are ignored.
        self._devices = jax.sharding.get_abstract_mesh().size if has_memory_axis() else 1
        self._num_rows = math.ceil(num_slots / self._devices) * self._devices
        self._slots: list[_Slot | None] = [None] * num_slots
        self._state: State | None = None
        self._unread: list[_Fresh] = []
        self._unmerged: list[_Fresh] = []
        self.prompts = Prompts(num_slots, min_capacity)
        """What the slots hold, where it is to be reused."""

    @property
    def is_busy(self) -> bool:
        """Whether any text is being written."""
        return any(self._slots)

    @property
    def free_slots(self) -> list[int]:
        """Slots without a text."""
        return [number for number, slot in enumerate(self._slots) if slot is None]

    def tokens_left(self) -> list[int]:
        """How many more tokens each running text may get."""
        return [slot.request.max_tokens - slot.num_made for slot in self._slots if slot is not None]

    def insert(self, requests: Sequence[Request], *, prefill_rows: int | None = None) -> list[int]:
        """Reads prompts into free slots and returns these; the next `step` gives their first tokens.

        Args:
            requests: what to write.
            prefill_rows: prompts that are read together, in place of the engine's number.

        Raises:
            ValueError: more requests than free slots, or one that cannot be met (`check`).
        """
        checks.refuse(_rows_wrong(prefill_rows))
        for request in requests:
            check(request, self.vocab_size)
        free = self.free_slots
        if len(requests) > len(free):
            raise ValueError(f"{len(requests)} requests do not fit into {len(free)} free slots of {self.num_slots}")
        if not self.is_busy:
            # The last texts may have been longer than those to come, or have had more stop tokens.
            if self._state is not None and self._state.room.tokens > self._min_capacity:
                self._forget()
            elif self._state is not None:
                self._state = self._state.with_fewest_stops()
            self._unmerged = []
        slots = self.prompts.by_age(free)[: len(requests)]
        joining = [self.prompts.joining(*pair) for pair in zip(requests, slots, strict=True)]
        whole, begun = ([one for one in joining if (one.start > 0) is is_begun] for is_begun in (False, True))
        rows = prefill_rows or self._prefill_rows
        for left in whole, begun:
            while left:
                some = self._read_together(left)
                self._prefill(some, None if whole and begun and len(some) == 1 else rows)
                left = left[len(some) :]
        return slots

    def step(self, max_tokens: int) -> dict[int, Made]:
        """Adds at most max_tokens (and LONGEST_CHUNK) tokens to every text, and its first one to a new text.

        Returns what was added by slot. A text that has ended leaves its slot. With max_tokens=0 only first tokens come.
        """
        found: dict[int, Made] = {}
        count = min(max_tokens, LONGEST_CHUNK)
        if count > 0 or self._state is not None:
            # Sent before the host waits for first tokens, so that the device has all it needs to go on. Where
            # no other text runs, first tokens do not wait for the decoding program to compile.
            self._merge(max(1, count))
        unread, self._unread = self._unread, []
        firsts = jax.device_get([(fresh.tokens, fresh.likelihoods) for fresh in unread])
        for fresh, (tokens, likely) in zip(unread, firsts, strict=True):
            self._take(found, fresh.slots.items(), tokens, likely)
        if count > 0 and self.is_busy:
            slots = [(number, slot) for number, slot in enumerate(self._slots) if slot is not None]
            mode, num_top = self._needs([slot.request for _, slot in slots])
            places = [number for number, _ in slots]
            is_wanted = np.zeros(self._num_rows, bool)
            is_wanted[places] = True
            self._state, tokens, likely = self._programs.decode(
                self._weights, self._state, is_wanted, np.int32(count), mode=mode, num_top=num_top
            )
            tokens, likely = jax.tree.map(lambda array: array[places], jax.device_get((tokens, likely)))
            self._take(found, slots, tokens, likely)
        return found

    def release(self, slot: int) -> None:
        """Ends a text before its end.

        Raises:
            ValueError: there is no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot={slot} must be in 0..{self.num_slots - 1}; release what insert has returned")
        self._slots[slot] = None

    def reset(self) -> None:
        """Ends every text and drops the cache, which a call that failed may have left half written."""
        self._slots = [None] * self.num_slots
        self._unread, self._unmerged = [], []
        self._forget()

    def _forget(self) -> None:
        """Drops the cache."""
        self._state = None
        self.prompts.clear()

    def _program_for(self, tokens: np.ndarray) -> Wrapped:
        """The program that reads so many prompt tokens."""
        return self._programs.prefill_few if tokens.size <= _FEW_TOKENS else self._programs.prefill

    def _read_together(self, joining: Sequence[Joining]) -> Sequence[Joining]:
        """The first of the prompts, as many as are read at once."""
        width, count = 0, 0
        for one in joining:
            width = max(width, self._min_capacity if one.start else one.width)
            if count and (count + 1) * width > _PREFILL_TOKENS:
                break
            count += 1
        return joining[:count]

    def _group(self, count: int, width: int, wanted: int | None) -> int:
        """Rows of the prefill of so many prompts."""
        wanted = next_power_of_two(count) if wanted is None else wanted
        rows = max(count, min(wanted, self._num_rows, _PREFILL_TOKENS // width))
        return math.ceil(rows / self._devices) * self._devices

    def _prefill(self, joining: Sequence[Joining], rows_wanted: int | None) -> None:
        """Reads prompts together, all from their beginning or none, and picks the first token of each."""
        width, is_begun = max(one.width for one in joining), joining[0].start > 0
        # What is copied takes as much of the cache as a whole row.
        size = self._min_capacity if is_begun else width
        group = self._group(len(joining), size, rows_wanted)
        tokens = np.zeros((group, size), np.int32)
        lengths, sources, starts = np.ones(group, np.int32), np.zeros(group, np.int32), np.zeros(group, np.int32)
        taken: dict[int, _Slot] = {}
        for row, (request, slot, source, start) in enumerate(joining):
            tokens[row, : len(request.prompt_ids)] = request.prompt_ids
            lengths[row], sources[row], starts[row] = len(request.prompt_ids), source, start
            self._slots[slot] = taken[slot] = _Slot(request, start)
        requests = [one.request for one in joining]
        rows = Rows.of([*requests, *[None] * (group - len(requests))])
        mode, num_top = self._needs(requests)
        if is_begun:
            assert self._state is not None, "prompts are held by its cache"
            others = self._state.cache, sources, starts
            logits, uses, cache = self._programs.extend(self._weights, *others, tokens, lengths, width=width)
        else:
            logits, uses, cache = self._program_for(tokens)(self._weights, tokens, lengths)
        state, made, likely = programs.start(logits, lengths, uses, rows, mode=mode, num_top=num_top)
        fresh = _Fresh(taken, state._replace(cache=cache), made, likely)
        self._unread.append(fresh)
        self._unmerged.append(fresh)

    def _merge(self, count: int) -> None:
        """Brings the state up to the texts that are there, with room for `count` more tokens of each."""
        unmerged, self._unmerged = self._unmerged, []
        states = [state for state in (self._state, *(fresh.state for fresh in unmerged)) if state is not None]
        if not states:
            return
        soon = [slot.capacity(count) for slot in self._slots if slot is not None]
        room = Room(*map(max, zip(*(state.room for state in states), strict=True)))
        room = room._replace(tokens=max(room.tokens, self._min_capacity, *soon))
        if self._state is not None and self._state.room != room:
            self._state = programs.grow(self._state, room=room)
        for fresh in unmerged:
            for number, slot in fresh.slots.items():
                self.prompts.put(number, slot.request.prompt_ids)
            if self._state is None and self._devices == 1 and list(fresh.slots) == list(range(self._num_rows)):
                # They fill all slots in their order: their state is that of the engine, and no cache is copied.
                has_room = fresh.state.room == room
                self._state = fresh.state if has_room else programs.grow(fresh.state, room=room)
                continue
            # Rows without a request go to no slot: each to another place past the last one.
            places = self._num_rows + np.arange(len(fresh.tokens), dtype=np.int32)
            places[: len(fresh.slots)] = list(fresh.slots)
            self._state = programs.insert(self._state, fresh.state, places, num_rows=self._num_rows, room=room)

    def _needs(self, requests: Sequence[Request]) -> tuple[Mode, int | None]:
        """The mode of the sampling, and how many likeliest tokens are reported."""
        mode = Mode.of([request.sampling for request in requests])
        most = max((request.logprobs for request in requests if request.logprobs is not None), default=None)
        known = next((known for known in self._modes if known.covers(mode)), mode)
        return known, None if most is None else top_count(most, self.vocab_size)

    def _take(
        self,
        found: dict[int, Made],
        slots: Iterable[tuple[int, _Slot]],
        tokens: Int[np.ndarray, "b n"],
        likely: Likelihoods | None,
    ) -> None:
        """Adds the tokens of rows to what was found of their slots; a text ends where its row does."""
        # As lists: NumPy takes longer for each of a few numbers.
        for row, ((number, slot), values) in enumerate(zip(slots, tokens.tolist(), strict=False)):
            # Unless it was released before anybody asked.
            if self._slots[number] is not slot:
                continue
            request, made = slot.request, found.setdefault(number, Made([]))
            if not slot.num_made:
                made.num_reused = slot.num_reused
            written = [token for token in values if token >= 0]
            after = values[len(written)] if len(written) < len(values) else NOTHING
            made.tokens += written
            slot.num_made += len(written)
            reported: list[TokenLogprobs] = []
            if request.logprobs is not None and likely is not None:
                places = range(len(written) + (after <= STOPPED))
                reported = [_logprobs_at(likely, (row, place), request.logprobs) for place in places]
                made.logprobs += reported[: len(written)]
            if after <= STOPPED:
                made.finish, made.stop = "stop", (STOPPED - after, reported[-1] if reported else None)
            elif slot.num_made == request.max_tokens:
                made.finish = "length"
            if made.finish is not None:
                self._slots[number] = None


def _rows_wrong(prefill_rows: int | None) -> list[str]:
    return [] if prefill_rows is None else checks.counts(prefill_rows=prefill_rows)


def _logprobs_at(likely: Likelihoods, at: tuple[int, int], num_top: int) -> TokenLogprobs:
    """The log-probabilities reported for one position of a row."""
    pairs = zip(likely.top_tokens[at].tolist(), likely.top[at].tolist(), strict=True)
    return TokenLogprobs(float(likely.chosen[at]), dict(list(pairs)[:num_top]))
