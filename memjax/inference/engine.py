"""The generation engine: one slot per text, batched prefill, many decoding steps per call."""

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
"""Most tokens per prefill call, padding included; bounds the activations. A longer prompt is prefilled alone."""
_FEW_TOKENS = 64
"""Up to this many prompt tokens, optimised compilation takes longer than it saves."""
_AT_ONCE = 1024
"""Caches up to this capacity are allocated in full for max_tokens; larger ones grow with the texts."""


@dataclasses.dataclass(slots=True)
class _Slot:
    """A text being generated."""

    request: Request
    num_reused: int = 0
    num_made: int = 0

    def capacity(self, count: int) -> int:
        """Cache capacity for `count` more tokens, or for all of max_tokens if that is at most `_AT_ONCE`."""
        start = len(self.request.prompt_ids)
        longest = start + self.request.max_tokens
        soon = min(longest, start + max(1, self.num_made) + count)
        return padded_length(max(soon, min(longest, _AT_ONCE)))


@dataclasses.dataclass(slots=True)
class _Fresh:
    """Prompts that were prefilled together, one per row."""

    slots: dict[int, _Slot]
    """The slots of the leading rows, in row order; the other rows are padding."""
    state: State
    tokens: Int[jax.Array, "b 1"]
    likelihoods: Likelihoods | None


class Engine:
    """Generates several texts at a time; requests join and leave while others are running::

        engine = Engine(model, num_slots=8)
        (slot,) = engine.insert([Request(prompt_ids=ids, max_tokens=100)])
        while engine.is_busy:
            for slot, made in engine.step(16).items():
                print(slot, made.tokens, made.finish)

    A text does not depend on the others in the batch: each row has its own positions and sees no other row, and draws
    depend on the seed, the prompt's number and the step. (Groups of different sizes are prefilled by different
    programs, whose sums may round differently; this can decide between tokens whose probabilities agree to the last
    digits.)

    Under a mesh, slots are split over its devices, as the batch is in training.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_slots: int,
        prefill_rows: int | None = None,
        min_capacity: int = 0,
        modes: Sequence[Mode] = (),
        reuse_prompts: bool = False,
    ):
        """Prepares the weights (`weights.prepare`); the cache is allocated when first needed.

        Args:
            model: the model; later changes to it do not reach the engine.
            num_slots: number of texts generated at a time.
            prefill_rows: rows per prefill call, padded if there are fewer prompts; None: the next power of two.
            min_capacity: minimum cache capacity per text, in tokens; texts up to this length share one decoding
                program.
            modes: sampling modes to compile for, the narrowest first. A batch uses the first that covers its needs; if
                none does, a program for exactly these needs is compiled.
            reuse_prompts: whether a prompt's longest prefix that a slot holds is copied from there, of prompts within
                min_capacity. Needs a single device, and rotary frequencies that do not depend on a text's length.
        """
        checks.refuse([*checks.counts(num_slots=num_slots), *_rows_wrong(prefill_rows)])
        self.num_slots = num_slots
        self._config, self._prefill_rows = model.config, prefill_rows
        self.vocab_size = model.config.vocab_size
        self._min_capacity, self._modes = min_capacity, tuple(modes)
        _, graphdef, structure, self._weights = prepare(model)
        self._programs = programs_of(graphdef, structure)
        # A mesh splits rows evenly over its devices; the excess rows are ignored.
        self._devices = jax.sharding.get_abstract_mesh().size if has_memory_axis() else 1
        self._num_rows = math.ceil(num_slots / self._devices) * self._devices
        self._slots: list[_Slot | None] = [None] * num_slots
        self._state: State | None = None
        self._unread: list[_Fresh] = []
        self._unmerged: list[_Fresh] = []
        self.prompts = Prompts(num_slots, min_capacity)
        """The prompts whose cache entries the slots hold, for reuse."""
        self.prompts.is_used = reuse_prompts and self._devices == 1 and not model.config.rotates_by_length

    @property
    def is_busy(self) -> bool:
        """Whether any text is being generated."""
        return any(self._slots)

    @property
    def free_slots(self) -> list[int]:
        """The slots that hold no text."""
        return [number for number, slot in enumerate(self._slots) if slot is None]

    def tokens_left(self) -> list[int]:
        """Remaining token budget of each running text."""
        return [slot.request.max_tokens - slot.num_made for slot in self._slots if slot is not None]

    def insert(self, requests: Sequence[Request], *, prefill_rows: int | None = None) -> list[int]:
        """Prefills prompts into free slots and returns the slots; the next `step` returns the first tokens.

        Args:
            requests: the texts to generate.
            prefill_rows: overrides the engine's `prefill_rows`.

        Raises:
            ValueError: there are more requests than free slots, or a request is invalid (`requests.check`).
        """
        checks.refuse(_rows_wrong(prefill_rows))
        for request in requests:
            check(request, self.vocab_size)
        free = self.free_slots
        if len(requests) > len(free):
            raise ValueError(f"{len(requests)} requests do not fit into {len(free)} free slots of {self.num_slots}")
        if not self.is_busy:
            # The previous texts may have been longer than the next ones.
            if self._state is not None and self._state.capacity > self._min_capacity:
                self._forget()
            self._unmerged = []
        slots = self.prompts.by_age(free)[: len(requests)]
        joining = [self.prompts.joining(*pair) for pair in zip(requests, slots, strict=True)]
        whole, begun = ([one for one in joining if (one.start > 0) is is_begun] for is_begun in (False, True))
        rows = prefill_rows or self._prefill_rows
        # If the two kinds divide a group, one prompt is not padded to a whole group.
        for left in whole, begun:
            while left:
                some = self._read_together(left)
                self._prefill(some, None if whole and begun and len(some) == 1 else rows)
                left = left[len(some) :]
        return slots

    def step(self, max_tokens: int) -> dict[int, Made]:
        """Adds up to max_tokens tokens (at most `LONGEST_CHUNK`) to each text; a new text also gets its first token.

        Returns what was added, by slot. A text that has ended leaves its slot. max_tokens=0 gives first tokens only.
        """
        found: dict[int, Made] = {}
        count = min(max_tokens, LONGEST_CHUNK)
        if count > 0 or self._state is not None:
            # Dispatched before the host waits for first tokens, so that the device stays busy. With max_tokens=0 and
            # no earlier text, first tokens need not wait for this to compile.
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
        """Stops a text early and frees its slot.

        Raises:
            ValueError: there is no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot={slot} must be in 0..{self.num_slots - 1}; release what insert has returned")
        self._slots[slot] = None

    def reset(self) -> None:
        """Stops all texts and drops the cache, which a failed call may have left half written."""
        self._slots = [None] * self.num_slots
        self._unread, self._unmerged = [], []
        self._forget()

    def _forget(self) -> None:
        """Drops the cache."""
        self._state = None
        self.prompts.clear()

    def _program_for(self, tokens: np.ndarray) -> Wrapped:
        """The prefill program for prompt tokens of this shape."""
        return self._programs.prefill_few if tokens.size <= _FEW_TOKENS else self._programs.prefill

    def _read_together(self, joining: Sequence[Joining]) -> Sequence[Joining]:
        """The longest prefix of the prompts that fits into one prefill call."""
        width, count = 0, 0
        for one in joining:
            width = max(width, one.size or one.width)
            if count and (count + 1) * width > _PREFILL_TOKENS:
                break
            count += 1
        return joining[:count]

    def _group(self, count: int, width: int, wanted: int | None) -> int:
        """Number of rows of a prefill of `count` prompts, padded to `width` tokens."""
        wanted = next_power_of_two(count) if wanted is None else wanted
        rows = max(count, min(wanted, self._num_rows, _PREFILL_TOKENS // width))
        return math.ceil(rows / self._devices) * self._devices

    def _prefill(self, joining: Sequence[Joining], rows_wanted: int | None) -> None:
        """Prefills prompts together, all whole or all with a reused prefix, and samples each one's first token."""
        width, is_begun = max(one.width for one in joining), joining[0].start > 0
        size = max(one.size for one in joining) or width
        group = self._group(len(joining), size, rows_wanted)
        tokens = np.zeros((group, size), np.int32)
        lengths, sources, starts = np.ones(group, np.int32), np.zeros(group, np.int32), np.zeros(group, np.int32)
        taken: dict[int, _Slot] = {}
        for row, one in enumerate(joining):
            prompt = one.request.prompt_ids
            tokens[row, : len(prompt)] = prompt
            lengths[row], sources[row], starts[row] = len(prompt), one.source, one.start
            self._slots[one.slot] = taken[one.slot] = _Slot(one.request, one.start)
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
        """Inserts newly prefilled rows into the state, and grows it to have room for `count` more tokens per text."""
        unmerged, self._unmerged = self._unmerged, []
        states = [state for state in (self._state, *(fresh.state for fresh in unmerged)) if state is not None]
        if not states:
            return
        soon = [slot.capacity(count) for slot in self._slots if slot is not None]
        capacity = max([self._min_capacity, *soon, *(state.capacity for state in states)])
        if self._state is not None and self._state.capacity != capacity:
            self._state = programs.grow(self._state, capacity=capacity)
        for fresh in unmerged:
            for number, slot in fresh.slots.items():
                self.prompts.put(number, slot.request.prompt_ids)
            if self._state is None and self._devices == 1 and list(fresh.slots) == list(range(self._num_rows)):
                # They fill all slots in order: their state becomes the engine's, without copying the cache.
                is_large = fresh.state.capacity == capacity
                self._state = fresh.state if is_large else programs.grow(fresh.state, capacity=capacity)
                continue
            # Padding rows get distinct out-of-range indices, so they are dropped.
            places = self._num_rows + np.arange(len(fresh.tokens), dtype=np.int32)
            places[: len(fresh.slots)] = list(fresh.slots)
            self._state = programs.insert(self._state, fresh.state, places, num_rows=self._num_rows, capacity=capacity)

    def _needs(self, requests: Sequence[Request]) -> tuple[Mode, int | None]:
        """The sampling mode, and how many of the likeliest tokens to report."""
        mode = Mode.of([request.sampling for request in requests], [request.logit_bias for request in requests])
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
        """Adds each row's tokens to its slot's entry in `found`, and frees the slots of texts that have ended."""
        # Lists are faster than NumPy for single elements.
        for row, ((number, slot), values) in enumerate(zip(slots, tokens.tolist(), strict=False)):
            # The text was released meanwhile.
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
