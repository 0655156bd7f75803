"""Generation in a few compiled programs: prompts are read at once, tokens are written many at a time.

An `Engine` has a fixed number of slots, each with a text in the making, which come and go independently. What compiles:

- prefill: for every power of two of prompt tokens, times powers of two of prompts that are inserted together;
- insertion into the slots: for each of these and each capacity of the cache;
- decoding: for each capacity of the cache, which is a power of two and grows as texts do, and each `sampling.Mode`.

How many tokens are decoded at a time, temperatures, seeds, stop tokens and lengths are data.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.config.sampling import SamplingConfig
from memjax.inference.sampling import GREEDY, Likelihoods, Mode, Rules, likelihoods, pick
from memjax.inference.weights import prepare
from memjax.models.decoder import Cache, Decoder
from memjax.ops.tiles import next_power_of_two
from memjax.sharding.axes import has_memory_axis, replicate, split_tokens

LONGEST_CHUNK = 32
"""Tokens that one call of the decoding program makes at most; the host looks at texts between calls only."""
_CHUNK_SECONDS = 0.05
"""Streams ask for more tokens at a time as long as a chunk takes less, so that text never comes in jerks."""
_PREFILL_TOKENS = 1 << 15
"""Prompt tokens, padding included, that are read at once: it bounds the activations. A longer prompt is read alone."""
_SMALLEST, _SMALLEST_ON_CPUS = 128, 16
"""Prompts and caches are padded to powers of two from here on. A GPU reads 128 tokens as fast as one, and compiling for
a length takes it many seconds."""
_AT_ONCE = 1024
"""Caches up to this capacity are allocated for the longest text that may come, larger ones grow with the texts."""
_TOP_COUNTS = (0, 5, 20)
"""Likeliest tokens are counted up to one of these, so that few programs compile."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A text to write."""

    prompt_ids: Sequence[int]
    """The prompt, its begin token included."""
    max_tokens: int
    """The most tokens to write."""
    sampling: SamplingConfig = GREEDY
    stop_ids: Collection[int] = ()
    """Tokens that end the text; they are not part of it."""
    number: int = 0
    """Of the prompt; with the seed it decides the draws."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report at each token, beside its own log-probability; None reports none."""


class TokenLogprobs(NamedTuple):
    """How likely the model holds tokens at one place, before any sampling setting: natural logarithms."""

    chosen: float
    """Of the token written."""
    top: dict[int, float]
    """Of the likeliest tokens, in falling order."""


@dataclasses.dataclass(slots=True)
class Made:
    """What one step has added to a text."""

    tokens: list[int]
    finish: Literal["stop", "length"] | None = None
    """Why the text ends with these tokens: a stop token came, or max_tokens are written. None: it goes on."""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """Of each token, if the request asks for them."""
    stop: tuple[int, TokenLogprobs | None] | None = None
    """The stop token that came, which is no part of the text, with its log-probabilities if the request asks."""


class Engine:
    """Writes several texts at a time; requests join and leave while others are being written::

        engine = Engine(model, num_slots=8)
        (slot,) = engine.insert([Request(prompt_ids=ids, max_tokens=100)])
        while engine.is_busy:
            for slot, made in engine.step(16).items():
                print(slot, made.tokens, made.finish)

    A text's tokens are those that it gets alone, whatever is written beside it: a row has positions of its own and sees
    no other, and draws depend on the seed, the prompt's number and the step. (Sums in another order can still decide
    between two tokens that are equally likely to the last digits.)

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
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} must be positive")
        self.num_slots = num_slots
        self._config, self._prefill_rows = model.config, prefill_rows
        self._min_capacity, self._modes = min_capacity, tuple(modes)
        graphdef, state = nnx.split(prepare(model))
        # A plain tuple, as each call takes its arguments apart anew.
        leaves, structure = jax.tree.flatten(state)
        self._weights, self._programs = tuple(leaves), _programs(graphdef, structure)
        # A mesh splits rows over its devices, so each needs as many as the others; nobody reads the rows in excess.
        self._devices = jax.sharding.get_abstract_mesh().size if has_memory_axis() else 1
        self._num_rows = math.ceil(num_slots / self._devices) * self._devices
        self._slots: list[_Slot | None] = [None] * num_slots
        self._state: _State | None = None
        self._rows: _Rows | None = None
        self._unread: list[_Fresh] = []
        self._unmerged: list[_Fresh] = []

    @property
    def is_busy(self) -> bool:
        """Whether any text is being written."""
        return any(self._slots)

    @property
    def free_slots(self) -> list[int]:
        """Slots without a text."""
        return [number for number, slot in enumerate(self._slots) if slot is None]

    def insert(self, requests: Sequence[Request], *, prefill_rows: int | None = None) -> list[int]:
        """Reads prompts into free slots and returns these; the next `step` gives their first tokens.

        Args:
            requests: what to write.
            prefill_rows: prompts that are read together, in place of the engine's number.

        Raises:
            ValueError: more requests than free slots, or one that cannot be met (`check`).
        """
        for request in requests:
            check(request, self._config.vocab_size)
        free = self.free_slots
        if len(requests) > len(free):
            raise ValueError(f"{len(requests)} requests do not fit into {len(free)} free slots of {self.num_slots}")
        if not self.is_busy:
            # The last texts may have been longer than those to come.
            if self._state is not None and _capacity(self._state) > self._min_capacity:
                self._state = None
            self._unmerged = []
        slots = free[: len(requests)]
        start = 0
        while start < len(requests):
            some = self._read_together(requests[start:])
            self._prefill(some, slots[start : start + len(some)], prefill_rows or self._prefill_rows)
            start += len(some)
        self._rows = None
        return slots

    def step(self, max_tokens: int) -> dict[int, Made]:
        """Adds at most max_tokens (and LONGEST_CHUNK) tokens to every text, and its first one to a new text.

        Returns what was added by slot. A text that has ended leaves its slot. With max_tokens=0 only first tokens come.
        """
        found: dict[int, Made] = {}
        unread, self._unread = self._unread, []
        firsts = jax.device_get([(fresh.tokens, fresh.likelihoods) for fresh in unread])
        for fresh, (tokens, likely) in zip(unread, firsts, strict=True):
            for row, (number, slot) in enumerate(fresh.slots.items()):
                # Unless it was released before anybody asked.
                if self._slots[number] is slot:
                    found[number] = self._take(number, tokens[row : row + 1], _row_of(likely, row, None))
        if max_tokens < 1 or not self.is_busy:
            return found
        tokens, likely = self._decode(min(max_tokens, LONGEST_CHUNK))
        for number, slot in enumerate(self._slots):
            if slot is not None:
                more = self._take(number, tokens[number], _row_of(likely, number, slice(None)))
                first = found.setdefault(number, Made([]))
                first.tokens += more.tokens
                first.logprobs += more.logprobs
                first.finish, first.stop = more.finish, more.stop
        return found

    def release(self, slot: int) -> None:
        """Ends a text before its end."""
        self._slots[slot] = None
        # Rows are sent anew with the next step, and then without this one.
        self._rows = None

    def reset(self) -> None:
        """Ends every text and drops the cache, which a call that failed may have left half written."""
        self._slots = [None] * self.num_slots
        self._state, self._rows, self._unread, self._unmerged = None, None, [], []

    def _needs(self, requests: Sequence[Request]) -> tuple[Mode, int | None]:
        """The mode of the sampling, and how many likeliest tokens are reported."""
        mode, num_top = _needs(requests)
        return next((known for known in self._modes if known.covers(mode)), mode), num_top

    def _read_together(self, requests: Sequence[Request]) -> Sequence[Request]:
        """The first of the requests, as many as are read at once."""
        width, count = 0, 0
        for request in requests:
            width = max(width, padded_length(len(request.prompt_ids)))
            if count and (count + 1) * width > _PREFILL_TOKENS:
                break
            count += 1
        return requests[:count]

    def _group(self, count: int, width: int, wanted: int | None) -> int:
        """Rows of the prefill of so many prompts."""
        wanted = next_power_of_two(count) if wanted is None else wanted
        rows = max(count, min(wanted, self._num_rows, _PREFILL_TOKENS // width))
        return math.ceil(rows / self._devices) * self._devices

    def _prefill(self, requests: Sequence[Request], slots: Sequence[int], rows_wanted: int | None) -> None:
        width = max(padded_length(len(request.prompt_ids)) for request in requests)
        group = self._group(len(requests), width, rows_wanted)
        tokens, lengths = np.zeros((group, width), np.int32), np.ones(group, np.int32)
        taken: dict[int, _Slot] = {}
        for row, (request, slot) in enumerate(zip(requests, slots, strict=True)):
            tokens[row, : len(request.prompt_ids)] = request.prompt_ids
            lengths[row] = len(request.prompt_ids)
            self._slots[slot] = taken[slot] = _Slot(request)
        rows = _Rows.of(list(requests) + [None] * (group - len(requests)))
        mode, num_top = self._needs(requests)
        logits, cache = self._programs.prefill(self._weights, tokens, lengths)
        state, made, likely = self._programs.start(logits, cache, tokens, rows, mode=mode, num_top=num_top)
        fresh = _Fresh(taken, state, made, likely)
        self._unread.append(fresh)
        self._unmerged.append(fresh)

    def _decode(self, count: int) -> tuple[Int[np.ndarray, "b n"], Likelihoods | None]:
        slots = [slot for slot in self._slots if slot is not None]
        unmerged, self._unmerged = self._unmerged, []
        widths = [_capacity(fresh.state) for fresh in unmerged]
        before = 0 if self._state is None else _capacity(self._state)
        capacity = max(before, self._min_capacity, *widths, *(slot.capacity(count) for slot in slots))
        if self._state is not None and before < capacity:
            self._state = self._programs.grow(self._state, capacity=capacity)
        for fresh in unmerged:
            # Rows without a request go to no slot.
            places = np.full(len(fresh.tokens), self._num_rows, np.int32)
            places[: len(fresh.slots)] = list(fresh.slots)
            sizes = {"num_rows": self._num_rows, "capacity": capacity}
            if self._state is None and self._devices == 1 and np.array_equal(places, np.arange(self._num_rows)):
                # They fill all slots in their order: their state is that of the engine, and no cache is copied.
                is_wide = _capacity(fresh.state) == capacity
                self._state = fresh.state if is_wide else self._programs.grow(fresh.state, capacity=capacity)
                continue
            self._state = self._programs.insert(self._state, fresh.state, places, **sizes)
        if self._rows is None:
            requests = [slot and slot.request for slot in self._slots]
            self._rows = jax.device_put(_Rows.of(requests + [None] * (self._num_rows - self.num_slots)))
        mode, num_top = self._needs([slot.request for slot in slots])
        self._state, made, likely = self._programs.decode(
            self._weights, self._state, self._rows, np.int32(count), mode=mode, num_top=num_top
        )
        return jax.device_get((made, likely))

    def _take(self, number: int, tokens: Int[np.ndarray, " n"], likely: Likelihoods | None) -> Made:
        """The tokens of a slot's row, which ends where the row does."""
        slot = self._slots[number]
        if slot is None:
            return Made([])
        request = slot.request
        # As a list: NumPy takes longer for each of a few numbers.
        values = tokens.tolist()
        made = Made([token for token in values if token >= 0])
        slot.num_made += len(made.tokens)
        stopped = [_STOPPED - token for token in values if token <= _STOPPED]
        reported: list[TokenLogprobs] = []
        if request.logprobs is not None and likely is not None:
            count = len(made.tokens) + len(stopped)
            reported = [_logprobs_at(likely, place, request.logprobs) for place in range(count)]
        made.logprobs = reported[: len(made.tokens)]
        if stopped:
            made.finish = "stop"
            made.stop = stopped[0], reported[-1] if reported else None
        elif slot.num_made == request.max_tokens:
            made.finish = "length"
        if made.finish is not None:
            self._slots[number] = None
            # Its row is inactive on the device too; the rows need not be sent for that.
        return made


def check(request: Request, vocab_size: int) -> None:
    """Raises a ValueError that says why a request cannot be met."""
    if not len(request.prompt_ids):
        raise ValueError(f"the ids of prompt {request.number} are empty; they need at least the begin token")
    for token in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"the ids of prompt {request.number} hold {token}; the model knows 0..{vocab_size - 1}")
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens={request.max_tokens} must be positive")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocab_size:
        raise ValueError(f"logprobs={request.logprobs} must be in 0..{vocab_size}, the tokens of the vocabulary")


def padded_length(length: int) -> int:
    """The length that a row of so many tokens is padded to: a power of two, so that few shapes are ever compiled."""
    smallest = _SMALLEST_ON_CPUS if jax.default_backend() == "cpu" else _SMALLEST
    return max(smallest, next_power_of_two(length))


class Pace:
    """How many tokens a stream asks for at a time: twice as many as before, while that takes less than a moment."""

    def __init__(self) -> None:
        """Begins with a single token."""
        self.tokens, self._began = 0, time.monotonic()

    def next(self) -> int:
        """The tokens to ask for now."""
        now = time.monotonic()
        grown = self.tokens * 2 if now - self._began < _CHUNK_SECONDS else self.tokens // 2
        self.tokens, self._began = min(max(1, grown), LONGEST_CHUNK), now
        return self.tokens


_STOPPED, _NOTHING = -2, -1
"""In place of a token: stop token t came here (_STOPPED - t); the text had ended before."""


@dataclasses.dataclass(slots=True)
class _Slot:
    request: Request
    num_made: int = 0

    def capacity(self, count: int) -> int:
        """Of a cache that holds the text with `count` more tokens, and with all to come where these are not many."""
        start = len(self.request.prompt_ids)
        longest = start + self.request.max_tokens
        soon = min(longest, start + max(1, self.num_made) + count)
        return padded_length(max(soon, min(longest, _AT_ONCE)))


class _Rows(NamedTuple):
    """The requests of rows as arrays."""

    rules: Rules
    limit: Int[Array, " b"]
    stop_ids: Int[Array, "b stops"]
    """Padded with a number that no token has."""
    is_used: Bool[Array, " b"]

    @classmethod
    def of(cls, requests: Sequence[Request | None]) -> "_Rows":
        width = next_power_of_two(max([4, *(len(request.stop_ids) for request in requests if request)]))
        stops = np.full((len(requests), width), _NOTHING, np.int32)
        for row, request in enumerate(requests):
            if request:
                stops[row, : len(request.stop_ids)] = list(request.stop_ids)
        rules = Rules.of([(request.sampling, request.number) if request else (GREEDY, 0) for request in requests])
        limit = np.array([request.max_tokens if request else 0 for request in requests], np.int32)
        is_used = np.array([request is not None for request in requests])
        return cls._make((rules, limit, stops, is_used))


class _State(NamedTuple):
    """What decoding changes."""

    cache: Cache
    token: Int[Array, " b"]
    """The last one of each text, which the cache does not hold yet."""
    num_made: Int[Array, " b"]
    is_active: Bool[Array, " b"]
    seen: Bool[Array, "b vocab"]
    """Which tokens the texts hold; kept up to date where a repetition penalty asks."""


class _Fresh(NamedTuple):
    """Prompts that were read."""

    slots: dict[int, _Slot]
    """Of the first rows, in their order."""
    state: _State
    tokens: Int[Array, " b"]
    likelihoods: Likelihoods | None


_Weights = tuple[Array, ...]


class _Programs(NamedTuple):
    """The compiled programs for models of one structure."""

    prefill: Callable[..., tuple[Array, Cache]]
    start: Callable[..., tuple[_State, Array, Likelihoods | None]]
    insert: Callable[..., _State]
    grow: Callable[..., _State]
    decode: Callable[..., tuple[_State, Array, Likelihoods | None]]


@functools.lru_cache(maxsize=8)
def _programs(graphdef: Any, structure: Any) -> _Programs:
    """The programs; a structure is compared once for an engine, not with every token."""

    def model_of(weights: _Weights) -> Decoder:
        return nnx.merge(graphdef, jax.tree.unflatten(structure, weights))

    @jax.jit
    def prefill(
        weights: _Weights, tokens: Int[Array, "b s"], lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b vocab"], Cache]:
        """Logits after the first `lengths` tokens of each row, and the cache of these."""
        model = model_of(weights)
        hidden, cache = model.hidden_with_cache(split_tokens(tokens), None)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        # The padding's keys stay in the cache behind its lengths: nobody sees them, and new tokens overwrite them.
        return model.logits(last), cache._replace(lengths=lengths)

    @functools.partial(jax.jit, static_argnames=("mode", "num_top"), donate_argnames="cache")
    def start(
        logits: Float[Array, "b vocab"],
        cache: Cache,
        tokens: Int[Array, "b s"],
        rows: _Rows,
        *,
        mode: Mode,
        num_top: int | None,
    ) -> tuple[_State, Int[Array, " b"], Likelihoods | None]:
        """The state of texts that were read, with the first token of each."""
        (num_rows, width), vocab_size = tokens.shape, logits.shape[1]
        seen = jnp.zeros(logits.shape, bool)
        if mode.penalty:
            is_text = jnp.arange(width)[None, :] < cache.lengths[:, None]
            # Padding is marked past the vocabulary, where nothing is written.
            text = jnp.where(is_text, tokens, vocab_size)
            seen = seen.at[jnp.arange(num_rows)[:, None], text].set(True, mode="drop")
        nothing = jnp.zeros(num_rows, jnp.int32)
        state = _State(cache=cache, token=nothing, num_made=nothing, is_active=rows.is_used, seen=seen)
        state, made, likely = _add_token(state, logits, rows, mode, num_top)
        return state, replicate(made), jax.tree.map(replicate, likely)

    @functools.partial(jax.jit, static_argnames=("num_rows", "capacity"), donate_argnames="state")
    def insert(state: _State | None, fresh: _State, slots: Int[Array, " b"], *, num_rows: int, capacity: int) -> _State:
        """The state with rows of another at the given slots; their caches are padded to its capacity."""
        # Whole rows are written: what another text has left there cannot come back as 0 * inf.
        fresh = _with_capacity(fresh, capacity)
        if state is None:
            empty = lambda array: split_tokens(jnp.zeros((num_rows, *array.shape[1:]), array.dtype))
            state = jax.tree.map(empty, fresh)
        return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state, fresh)

    @functools.partial(jax.jit, static_argnames="capacity")
    def grow(state: _State, *, capacity: int) -> _State:
        """The state with room for more tokens."""
        return _with_capacity(state, capacity)

    @functools.partial(jax.jit, static_argnames=("mode", "num_top"), donate_argnames="state")
    def decode(
        weights: _Weights,
        state: _State,
        rows: _Rows,
        count: Int[Array, ""],
        *,
        mode: Mode,
        num_top: int | None,
    ) -> tuple[_State, Int[Array, "b n"], Likelihoods | None]:
        """`count` more tokens of each text, fewer where all of them end before."""
        num_rows = len(state.token)
        state = state._replace(is_active=state.is_active & rows.is_used)

        def add(carry: tuple[Array, _State, Array, Any]) -> tuple[Array, _State, Array, Any]:
            place, state, tokens, reported = carry
            model = model_of(weights)
            hidden, cache = model.hidden_with_cache(state.token[:, None], state.cache)
            lengths = jnp.where(state.is_active, cache.lengths, state.cache.lengths)
            state = state._replace(cache=cache._replace(lengths=lengths))
            state, made, likely = _add_token(state, model.logits(hidden[:, 0]), rows, mode, num_top)
            write = lambda all_, one: all_.at[:, place].set(one)
            return place + 1, state, write(tokens, made), jax.tree.map(write, reported, likely)

        tokens = jnp.full((num_rows, LONGEST_CHUNK), _NOTHING, jnp.int32)
        reported = None
        if num_top is not None:
            shape = (num_rows, LONGEST_CHUNK)
            reported = Likelihoods(
                jnp.zeros(shape), jnp.zeros((*shape, num_top)), jnp.zeros((*shape, num_top), jnp.int32)
            )
        go_on = lambda carry: (carry[0] < count) & jnp.any(carry[1].is_active)
        _, state, tokens, reported = jax.lax.while_loop(go_on, add, (jnp.int32(0), state, tokens, reported))
        return state, replicate(tokens), jax.tree.map(replicate, reported)

    return _Programs(prefill, start, insert, grow, decode)


def _add_token(
    state: _State, logits: Float[Array, "b vocab"], rows: _Rows, mode: Mode, num_top: int | None
) -> tuple[_State, Int[Array, " b"], Likelihoods | None]:
    """The next token of every active text, in the state and as what the host is given."""
    picked = pick(logits, state.seen, rows.rules, state.num_made, mode=mode)
    is_stop = jnp.any(picked[:, None] == rows.stop_ids, axis=1)
    made = jnp.where(state.is_active, jnp.where(is_stop, _STOPPED - picked, picked), _NOTHING)
    is_made = state.is_active & ~is_stop
    num_made = state.num_made + is_made
    seen = state.seen
    if mode.penalty:
        seen = seen.at[jnp.arange(len(picked)), picked].set(True)
    state = state._replace(token=picked, num_made=num_made, is_active=is_made & (num_made < rows.limit), seen=seen)
    return state, made, None if num_top is None else likelihoods(logits, picked, num_top)


def _capacity(state: _State) -> int:
    return state.cache.blocks[0].keys.shape[2]


def _with_capacity(state: _State, capacity: int) -> _State:
    """The state with a cache of more places."""
    more = lambda array: jnp.pad(array, [(0, 0), (0, 0), (0, capacity - array.shape[2]), (0, 0)])
    return state._replace(cache=state.cache._replace(blocks=jax.tree.map(more, state.cache.blocks)))


def _needs(requests: Sequence[Request]) -> tuple[Mode, int | None]:
    """The mode of the sampling, and how many likeliest tokens are reported."""
    counts = [request.logprobs for request in requests if request.logprobs is not None]
    most = max(counts, default=None)
    if most is not None:
        most = top_count(most)
    return Mode.of([request.sampling for request in requests]), most


def top_count(most: int) -> int:
    """How many of the likeliest tokens are counted where so many are asked for."""
    return next((count for count in _TOP_COUNTS if count >= most), most)


def _logprobs_at(likely: Likelihoods, place: int, num_top: int) -> TokenLogprobs:
    """What a request is given for one place."""
    pairs = zip(likely.top_tokens[place].tolist(), likely.top[place].tolist(), strict=True)
    return TokenLogprobs(float(likely.chosen[place]), dict(list(pairs)[:num_top]))


def _row_of(likely: Likelihoods | None, row: int, places: slice | None) -> Likelihoods | None:
    """One row, as what belongs to a sequence of tokens."""
    return None if likely is None else Likelihoods(*(array[row][places] for array in likely))


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: SamplingConfig = GREEDY,
    stop_ids: Collection[int] = (),
    number: int = 0,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, soon after they are made.

    Rotary positions have no last one, so prompt and answer may be longer than the sequences of the training; memory for
    the cache is the only limit.

    Args:
        model: the model.
        prompt_ids: the prompt, its begin token included.
        max_tokens: the most tokens to make.
        sampling: how tokens are picked; by default the likeliest.
        stop_ids: tokens that end the text; they are not yielded.
        number: of the prompt; with the seed it decides the draws.

    Raises:
        ValueError: the prompt is empty or holds ids that the model does not know, or max_tokens is negative.
    """
    steps = generate_batch(
        model, [prompt_ids], max_tokens=max_tokens, sampling=sampling, stop_ids=stop_ids, first_number=number
    )
    return (token for (token,) in steps if token is not None)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: SamplingConfig = GREEDY,
    stop_ids: Collection[int] = (),
    first_number: int = 0,
    num_rows: int = 1,
) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token of every prompt; None from where a prompt's text has ended.

    A prompt's tokens are those that it gets alone, see `Engine`.

    Args:
        model: the model.
        prompts: ids of each prompt, begin tokens included; of any lengths.
        max_tokens: the most tokens to make for each prompt.
        sampling: how tokens are picked; by default the likeliest.
        stop_ids: tokens that end a text; they are not yielded.
        first_number: the number of the first prompt; the others count on from it.
        num_rows: rows to compute at least. Batches of one size share one compiled program, also a last one that is
            not full.

    Raises:
        ValueError: there is no prompt, one is empty or holds ids that the model does not know, or max_tokens is
            negative.
    """
    if not len(prompts):
        raise ValueError("prompts is empty; it needs at least one prompt")
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative")
    stop_ids = frozenset(stop_ids)
    requests = [
        Request(
            prompt_ids=prompt_ids, max_tokens=max(1, max_tokens), sampling=sampling, stop_ids=stop_ids, number=number
        )
        for number, prompt_ids in enumerate(prompts, first_number)
    ]
    for request in requests:
        check(request, model.config.vocab_size)
    # A function of its own, so that the checks run at the call and not at the first token.
    return _steps(model, requests, max(num_rows, len(requests))) if max_tokens else iter(())


def _steps(model: Decoder, requests: Sequence[Request], num_rows: int) -> Iterator[list[int | None]]:
    engine = Engine(model, num_slots=num_rows, prefill_rows=num_rows)
    slots = engine.insert(requests)
    made, pace = engine.step(0), Pace()
    while True:
        texts = [made[slot].tokens if slot in made else [] for slot in slots]
        for place in range(max(map(len, texts))):
            yield [text[place] if place < len(text) else None for text in texts]
        if not engine.is_busy:
            return
        made = engine.step(pace.next())
