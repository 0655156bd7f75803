"""The compiled programs of an engine, and the state of texts that is passed between them.

- prefill processes whole prompts: one program per padded length and number of prompts, both powers of two;
- extend processes prompts whose prefix is cached: one program per number of prompts and padded lengths of prompt and
  rest, which are fewer (`extended_sizes`);
- start samples each prompt's first token: one program per number of prompts and `sampling.Mode`;
- insert copies prefilled rows into the engine's slots: one program per prefill shape and cache capacity;
- decode generates tokens: one program per cache capacity, a power of two, and mode.

The number of tokens per call, temperatures, seeds, stop tokens and lengths are arguments, which need no recompilation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int

from memjax.inference.requests import MOST_STOPS, Request
from memjax.inference.sampling import GREEDY, Likelihoods, Mode, Rules, likelihoods, pick
from memjax.models.decoder import Cache, Decoder
from memjax.ops.tiles import next_power_of_two
from memjax.sharding.axes import replicate, split_tokens

LONGEST_CHUNK = 32
"""Maximum number of tokens per call of the decoding program; the host sees texts only between calls."""
STOPPED, NOTHING = -2, -1
"""Codes in place of a token: STOPPED - t means that stop token t was sampled here, NOTHING that the text has ended."""
_SMALLEST, _SMALLEST_ON_CPUS = 128, 16
"""Smallest power of two to which prompts and caches are padded. A GPU prefills 128 tokens as fast as one, and compiling
for another length takes many seconds."""
_TOP_COUNTS = (5, 20)
"""Requested numbers of likeliest tokens are rounded up to these, so that few programs are compiled."""


class Rows(NamedTuple):
    """One request per row, as arrays."""

    rules: Rules
    limit: Int[Array, " b"]
    """Maximum number of tokens to generate; 0 in rows without a text."""
    stop_ids: Int[Array, "b stops"]
    """Padded with `NOTHING`, which is no token id, to the maximum, so that their number needs no other program."""

    @classmethod
    def of(cls, requests: Sequence[Request | None]) -> "Rows":
        """The requests as NumPy arrays; None is a row without a text."""
        stops = np.full((len(requests), MOST_STOPS), NOTHING, np.int32)
        for row, request in enumerate(requests):
            if request:
                stops[row, : len(request.stop_ids)] = list(request.stop_ids)
        rules = Rules.of(
            [(request.sampling, request.number) if request else (GREEDY, 0) for request in requests],
            [request.logit_bias if request else {} for request in requests],
        )
        limit = np.array([min(request.max_tokens, 2**31 - 1) if request else 0 for request in requests], np.int32)
        return cls._make((rules, limit, stops))


class State(NamedTuple):
    """The texts being generated, one per row."""

    rows: Rows
    cache: Cache
    token: Int[Array, " b"]
    """Each text's last token, which is not in the cache yet."""
    num_made: Int[Array, " b"]
    """Number of tokens generated; set to the limit once the text has ended."""
    uses: Int[Array, "b vocab"]
    """How often each token has been generated; -1 if it is not in the prompt either. Updated only for penalties."""

    @property
    def is_active(self) -> Bool[Array, " b"]:
        """Which texts have not ended."""
        return self.num_made < self.rows.limit

    @property
    def capacity(self) -> int:
        """Number of cache positions per row."""
        return self.cache.blocks[0].keys.shape[2]


Tree = TypeVar("Tree")
Weights = tuple[Array, ...]
ModelOf = Callable[[Weights], Decoder]


class Programs(NamedTuple):
    """The compiled programs for models of one structure."""

    prefill: Wrapped
    prefill_few: Wrapped
    """For short prompts: on CPUs, compiled without optimisations."""
    extend: Wrapped
    decode: Wrapped


@functools.lru_cache(maxsize=8)
def programs_of(graphdef: Any, structure: Any) -> Programs:
    """The programs; the model's structure is hashed once per engine, not at every call."""
    model_of = lambda weights: nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
    read, read_on, write = (functools.partial(function, model_of) for function in (prefill, extend, decode))
    # On CPUs the latency of a first text is mostly compilation, and optimisations save a short prompt no millisecond.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    few = jax.jit(read, compiler_options=options)
    writing = jax.jit(write, static_argnames=("mode", "num_top"), donate_argnames="state")
    return Programs(jax.jit(read), few, jax.jit(read_on, static_argnames="width"), writing)


def prefill(
    model_of: ModelOf, weights: Weights, tokens: Int[Array, "b s"], lengths: Int[Array, " b"]
) -> tuple[Float[Array, "b vocab"], Int[Array, "b vocab"], Cache]:
    """Logits after the first `lengths` tokens of each row, `State.uses`, and the cache of these tokens."""
    model = model_of(weights)
    is_text = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    hidden, cache = model.hidden_with_cache(split_tokens(tokens), None, split_tokens(is_text))
    return _split((*_read(model, hidden, lengths, tokens, lengths), cache))


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
    """`prefill` of rows whose first `starts` tokens are copied from rows `sources` of a cache.

    At most `width` tokens of each row are left to process.
    """
    size = tokens.shape[1]
    model = model_of(weights)
    # Indices past the row repeat its last token, at positions past the copy, which are not written.
    rest = jnp.take_along_axis(tokens, starts[:, None] + jnp.arange(width)[None], axis=1, mode="clip")
    copied = Cache(jax.tree.map(lambda array: array[sources, :, :size], cache.blocks), starts)
    hidden, copied = model.hidden_with_cache(rest, copied)
    return *_read(model, hidden, lengths - starts, tokens, lengths), copied._replace(lengths=lengths)


def _read(
    model: Decoder,
    hidden: Float[Array, "b w dim"],
    ends: Int[Array, " b"],
    tokens: Int[Array, "b s"],
    lengths: Int[Array, " b"],
) -> tuple[Float[Array, "b vocab"], Int[Array, "b vocab"]]:
    """Logits after the first `ends` hidden states of each row, and `State.uses` of its first `lengths` tokens."""
    logits = model.logits(jnp.take_along_axis(hidden, ends[:, None, None] - 1, axis=1)[:, 0])
    # Padding gets an index past the vocabulary, which the scatter drops.
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
    """The state of prefilled prompts with the first token of each; the caller adds the blocks of the cache."""
    nothing = jnp.zeros(len(logits), jnp.int32)
    cache = Cache((), lengths)
    state = State(rows, cache, token=nothing, num_made=nothing, uses=uses)
    state, made, likely = _add_token(state, logits, mode, num_top)
    # With an axis of tokens, as `decode` returns them.
    return _split(state), replicate(made[:, None]), jax.tree.map(lambda array: replicate(array[:, None]), likely)


@functools.partial(jax.jit, static_argnames=("num_rows", "capacity"), donate_argnames="state")
def insert(state: State | None, fresh: State, slots: Int[Array, " b"], *, num_rows: int, capacity: int) -> State:
    """The state with the rows of `fresh`, enlarged to `capacity`, at the given slots, which must be distinct."""
    # Whole rows are overwritten, so that remains of another text cannot cause NaN as 0 * inf.
    fresh = _enlarged(fresh, capacity)
    if state is None:
        state = jax.tree.map(lambda array: jnp.zeros((num_rows, *array.shape[1:]), array.dtype), fresh)
    # Unique indices let XLA write rows in any order.
    write = lambda old, new: old.at[slots].set(new, mode="drop", unique_indices=True)
    return _split(jax.tree.map(write, state, fresh))


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: State, *, capacity: int) -> State:
    """The state enlarged to `capacity`."""
    return _enlarged(state, capacity)


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
    """Generates `count` more tokens of each wanted text, or fewer if all of them end earlier."""
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
    return _split(state), replicate(tokens), jax.tree.map(replicate, reported)


def _add_token(
    state: State, logits: Float[Array, "b vocab"], mode: Mode, num_top: int | None
) -> tuple[State, Int[Array, " b"], Likelihoods | None]:
    """Samples the next token of each active text; returns the new state and what the host receives."""
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


def _split(rows: Tree) -> Tree:
    """The rows sharded over the devices of a mesh: alike by all programs, so that none is compiled for two layouts."""
    return jax.tree.map(split_tokens, rows)


def _enlarged(state: State, capacity: int) -> State:
    more = lambda array: jnp.pad(array, [(0, 0), (0, 0), (0, capacity - array.shape[2]), (0, 0)])
    return state._replace(cache=state.cache._replace(blocks=jax.tree.map(more, state.cache.blocks)))


def padded_length(length: int) -> int:
    """The length to which a row of `length` tokens is padded: a power of two, so that few shapes are compiled."""
    smallest = _SMALLEST_ON_CPUS if jax.default_backend() == "cpu" else _SMALLEST
    return max(smallest, next_power_of_two(length))


def extended_sizes(capacity: int) -> list[tuple[int, int]]:
    """Padded lengths of prompts whose prefix is reused, each with those of the rest: powers of 4 apart, largest first.

    Each pair needs a program. Copying and attending to too many columns takes little time, compared with compilation.
    """
    smallest = padded_length(1)
    sizes = [capacity >> shift for shift in range(0, capacity.bit_length(), 2)]
    widths = [smallest << shift for shift in range(0, capacity.bit_length(), 2)]
    return [(size, width) for size in sizes for width in widths if width < size]


def top_counts(vocab_size: int) -> list[int]:
    """The numbers of likeliest tokens for which programs are compiled in advance."""
    return sorted({min(count, vocab_size) for count in _TOP_COUNTS})


def top_count(most: int, vocab_size: int) -> int:
    """How many of the likeliest tokens to compute if `most` are requested."""
    return min(next((count for count in _TOP_COUNTS if count >= most), most), vocab_size)
