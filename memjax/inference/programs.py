"""The compiled programs of an engine, and the state of the texts that they pass on.

- prefill reads prompts: for every power of two of prompt tokens, times powers of two of prompts that are read together;
- extend reads prompts that begin like one whose cache a row holds, likewise by the tokens that are left to read;
- start picks the first token of each: for these numbers of prompts and each `sampling.Mode`;
- insert puts what was read into the engine's slots: for each size of a prefill and each capacity of the cache;
- decode writes tokens: for each capacity of the cache, which is a power of two, and each mode.

How many tokens are decoded at a time, temperatures, seeds, stop tokens and lengths are data.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int

from memjax.inference.requests import Request
from memjax.inference.sampling import GREEDY, Likelihoods, Mode, Rules, likelihoods, pick
from memjax.models.decoder import Cache, Decoder
from memjax.ops.tiles import next_power_of_two
from memjax.sharding.axes import replicate, split_tokens

LONGEST_CHUNK = 32
"""Tokens that one call of the decoding program makes at most; the host looks at texts between calls only."""
STOPPED, NOTHING = -2, -1
"""In place of a token: stop token t came here (STOPPED - t); the text had ended before."""
_SMALLEST, _SMALLEST_ON_CPUS = 128, 16
"""Prompts and caches are padded to powers of two from here on. A GPU reads 128 tokens as fast as one, and compiling for
a length takes it many seconds."""
_FEWEST_STOPS = 4
_TOP_COUNTS = (5, 20)
"""Likeliest tokens are counted up to one of these, so that few programs compile."""


class Rows(NamedTuple):
    """The requests of rows as arrays."""

    rules: Rules
    limit: Int[Array, " b"]
    """Tokens to write; 0 in rows without a text."""
    stop_ids: Int[Array, "b stops"]
    """Padded with a number that no token has."""

    @property
    def num_stops(self) -> int:
        """Stop tokens that each row has room for."""
        return self.stop_ids.shape[1]

    @classmethod
    def of(cls, requests: Sequence[Request | None]) -> "Rows":
        """The rows of requests, as NumPy arrays; None is a row without a text."""
        width = next_power_of_two(max([_FEWEST_STOPS, *(len(request.stop_ids) for request in requests if request)]))
        stops = np.full((len(requests), width), NOTHING, np.int32)
        for row, request in enumerate(requests):
            if request:
                stops[row, : len(request.stop_ids)] = list(request.stop_ids)
        rules = Rules.of([(request.sampling, request.number) if request else (GREEDY, 0) for request in requests])
        limit = np.array([min(request.max_tokens, 2**31 - 1) if request else 0 for request in requests], np.int32)
        return cls._make((rules, limit, stops))


class Room(NamedTuple):
    """The most that rows of a state can hold."""

    tokens: int
    """Positions of the cache."""
    stop_ids: int


class State(NamedTuple):
    """Texts in the making, a row each."""

    rows: Rows
    cache: Cache
    token: Int[Array, " b"]
    """The last one of each text, which the cache does not hold yet."""
    num_made: Int[Array, " b"]
    """Tokens written; the limit once the text has ended."""
    uses: Int[Array, "b vocab"]
    """How often a text has written each token, -1 where its prompt does not hold it either; kept up to date where a
    penalty asks."""

    @property
    def is_active(self) -> Bool[Array, " b"]:
        """Which texts go on."""
        return self.num_made < self.rows.limit

    @property
    def room(self) -> Room:
        """Capacity of its rows."""
        return Room(self.cache.blocks[0].keys.shape[2], self.rows.num_stops)

    def with_fewest_stops(self) -> "State":
        """A state without texts, with room for as few stop tokens as any has."""
        if self.rows.num_stops == _FEWEST_STOPS:
            return self
        return self._replace(rows=self.rows._replace(stop_ids=self.rows.stop_ids[:, :_FEWEST_STOPS]))


Weights = tuple[Array, ...]
ModelOf = Callable[[Weights], Decoder]


class Programs(NamedTuple):
    """The compiled programs for models of one structure."""

    prefill: Wrapped
    prefill_few: Wrapped
    """For few tokens."""
    extend: Wrapped
    decode: Wrapped


@functools.lru_cache(maxsize=8)
def programs_of(graphdef: Any, structure: Any) -> Programs:
    """The programs; a structure is compared once for an engine, not with every token."""
    model_of = lambda weights: nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
    read, read_on, write = (functools.partial(function, model_of) for function in (prefill, extend, decode))
    # On a CPU a first text waits for the compiler above all, whose optimisations save a short prompt no millisecond.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    few = jax.jit(read, compiler_options=options)
    writing = jax.jit(write, static_argnames=("mode", "num_top"), donate_argnames="state")
    return Programs(jax.jit(read), few, jax.jit(read_on, static_argnames="width"), writing)


def prefill(
    model_of: ModelOf, weights: Weights, tokens: Int[Array, "b s"], lengths: Int[Array, " b"]
) -> tuple[Float[Array, "b vocab"], Int[Array, "b vocab"], Cache]:
    """Logits after the first `lengths` tokens of each row, its `State.uses`, and the cache of these tokens."""
    model = model_of(weights)
    is_text = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    hidden, cache = model.hidden_with_cache(split_tokens(tokens), None, split_tokens(is_text))
    return *_read(model, hidden, lengths, tokens, lengths), cache


def extend(
    model_of: ModelOf,
    weights: Weights,
    cache: Cache,
    sources: Int[Array, " b"],
    starts: Int[Array, " b"],
    tokens: Int[Array, "b s"],
    lengths: Int[Array, " b"],
    *,
    width: int,
) -> tuple[Float[Array, "b vocab"], Int[Array, "b vocab"], Cache]:
    """`prefill` of rows that begin like rows of a cache, for `starts` tokens, and have at most `width` others."""
    model = model_of(weights)
    # Beyond the end the last token is read again, and written nowhere.
    rest = jnp.take_along_axis(tokens, starts[:, None] + jnp.arange(width)[None], axis=1, mode="clip")
    copied = Cache(jax.tree.map(lambda array: array[sources], cache.blocks), starts)
    hidden, copied = model.hidden_with_cache(rest, copied)
    return *_read(model, hidden, lengths - starts, tokens, lengths), copied._replace(lengths=lengths)


def _read(
    model: Decoder,
    hidden: Float[Array, "b w dim"],
    ends: Int[Array, " b"],
    tokens: Int[Array, "b s"],
    lengths: Int[Array, " b"],
) -> tuple[Float[Array, "b vocab"], Int[Array, "b vocab"]]:
    """Logits after the first `ends` states of rows, and `State.uses` after the first `lengths` tokens."""
    logits = model.logits(jnp.take_along_axis(hidden, ends[:, None, None] - 1, axis=1)[:, 0])
    # Padding is marked past the vocabulary, where nothing is written.
    text = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, logits.shape[1])
    uses = jnp.full(logits.shape, -1, jnp.int32)
    return logits, uses.at[jnp.arange(len(tokens))[:, None], text].set(0, mode="drop")


@functools.partial(jax.jit, static_argnames=("mode", "num_top"))
def start(
    logits: Float[Array, "b vocab"],
    lengths: Int[Array, " b"],
    uses: Int[Array, "b vocab"],
    rows: Rows,
    *,
    mode: Mode,
    num_top: int | None,
) -> tuple[State, Int[Array, "b 1"], Likelihoods | None]:
    """The state of prompts that were read, with the first token of each; the blocks of the cache are added later."""
    nothing = jnp.zeros(len(logits), jnp.int32)
    cache = Cache((), lengths)
    state = State(rows, cache, token=nothing, num_made=nothing, uses=uses)
    state, made, likely = _add_token(state, logits, mode, num_top)
    # With an axis of places, as decoding has it.
    return state, replicate(made[:, None]), jax.tree.map(lambda array: replicate(array[:, None]), likely)


@functools.partial(jax.jit, static_argnames=("num_rows", "room"), donate_argnames="state")
def insert(state: State | None, fresh: State, slots: Int[Array, " b"], *, num_rows: int, room: Room) -> State:
    """The state with the rows of `fresh` at the given slots, which must differ; they get as much room as the other
    rows.
    """
    # Whole rows are written: what another text has left there cannot come back as 0 * inf.
    fresh = _with_room(fresh, room)
    if state is None:
        empty = lambda array: split_tokens(jnp.zeros((num_rows, *array.shape[1:]), array.dtype))
        state = jax.tree.map(empty, fresh)
    # Unique indices let XLA write rows in any order.
    return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop", unique_indices=True), state, fresh)


@functools.partial(jax.jit, static_argnames="room")
def grow(state: State, *, room: Room) -> State:
    """The state with more room."""
    return _with_room(state, room)


def decode(
    model_of: ModelOf,
    weights: Weights,
    state: State,
    is_wanted: Bool[Array, " b"],
    count: Int[Array, ""],
    *,
    mode: Mode,
    num_top: int | None,
) -> tuple[State, Int[Array, "b n"], Likelihoods | None]:
    """`count` more tokens of each wanted text, or fewer if all of them end earlier."""
    num_rows = len(state.token)
    state = state._replace(num_made=jnp.where(is_wanted, state.num_made, state.rows.limit))

    def add(carry: tuple[Array, State, Array, Any]) -> tuple[Array, State, Array, Any]:
        place, state, tokens, reported = carry
        model = model_of(weights)
        hidden, cache = model.hidden_with_cache(state.token[:, None], state.cache)
        lengths = jnp.where(state.is_active, cache.lengths, state.cache.lengths)
        state = state._replace(cache=cache._replace(lengths=lengths))
        state, made, likely = _add_token(state, model.logits(hidden[:, 0]), mode, num_top)
        write = lambda all_, one: all_.at[:, place].set(one)
        return place + 1, state, write(tokens, made), jax.tree.map(write, reported, likely)

    tokens = jnp.full((num_rows, LONGEST_CHUNK), NOTHING, jnp.int32)
    reported = None
    if num_top is not None:
        shape = (num_rows, LONGEST_CHUNK)
        reported = Likelihoods(jnp.zeros(shape), jnp.zeros((*shape, num_top)), jnp.zeros((*shape, num_top), jnp.int32))
    go_on = lambda carry: (carry[0] < count) & jnp.any(carry[1].is_active)
    _, state, tokens, reported = jax.lax.while_loop(go_on, add, (jnp.int32(0), state, tokens, reported))
    return state, replicate(tokens), jax.tree.map(replicate, reported)


def _add_token(
    state: State, logits: Float[Array, "b vocab"], mode: Mode, num_top: int | None
) -> tuple[State, Int[Array, " b"], Likelihoods | None]:
    """The next token of every active text, in the state and as what the host is given."""
    rows = state.rows
    picked = pick(logits, state.uses, rows.rules, state.num_made, mode=mode)
    is_stop = jnp.any(picked[:, None] == rows.stop_ids, axis=1)
    made = jnp.where(state.is_active, jnp.where(is_stop, STOPPED - picked, picked), NOTHING)
    num_made = jnp.where(is_stop, rows.limit, jnp.minimum(state.num_made + 1, rows.limit))
    uses = state.uses
    if mode.penalty:
        place = jnp.arange(len(picked)), picked
        uses = uses.at[place].set(jnp.maximum(uses[place], 0) + 1)
    state = state._replace(token=picked, num_made=num_made, uses=uses)
    return state, made, None if num_top is None else likelihoods(logits, picked, num_top)


def _with_room(state: State, room: Room) -> State:
    """The state with more places in its cache and for stop tokens."""
    tokens, stop_ids = (wanted - has for wanted, has in zip(room, state.room, strict=True))
    more = lambda array: jnp.pad(array, [(0, 0), (0, 0), (0, tokens), (0, 0)])
    cache = state.cache._replace(blocks=jax.tree.map(more, state.cache.blocks))
    stops = jnp.pad(state.rows.stop_ids, [(0, 0), (0, stop_ids)], constant_values=NOTHING)
    return state._replace(cache=cache, rows=state.rows._replace(stop_ids=stops))


def padded_length(length: int) -> int:
    """The length that a row of so many tokens is padded to: a power of two, so that few shapes are ever compiled."""
    smallest = _SMALLEST_ON_CPUS if jax.default_backend() == "cpu" else _SMALLEST
    return max(smallest, next_power_of_two(length))


def top_counts(vocab_size: int) -> list[int]:
    """The numbers of likeliest tokens that are counted in the first place."""
    return sorted({min(count, vocab_size) for count in _TOP_COUNTS})


def top_count(most: int, vocab_size: int) -> int:
    """How many of the likeliest tokens are counted where so many are asked for."""
    return min(next((count for count in _TOP_COUNTS if count >= most), most), vocab_size)
