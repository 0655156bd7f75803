"""The engine of a server, and the compilation of its programs before requests arrive."""

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import numpy as np
from jax.stages import Lowered

from memjax.inference import programs
from memjax.inference.engine import Engine
from memjax.inference.programs import Rows, extended_sizes, padded_length, top_counts
from memjax.inference.requests import Request
from memjax.inference.sampling import Mode
from memjax.inference.scheduler import prefill_rows
from memjax.inference.scoring import PromptScorer
from memjax.models.decoder import Decoder
from memjax.sharding.axes import split_tokens

_USUAL = Mode(), Mode(draws=True, top_k=True, top_p=True, min_p=True)
_MODES = *_USUAL, Mode(*[True] * len(Mode._fields))
"""A server's sampling modes: few, so that all their programs are compiled early."""


class ServingEngine(Engine):
    """An engine with one decoding program for each of `_MODES`, which can be compiled before requests arrive."""

    def __init__(self, model: Decoder, *, num_slots: int, max_length: int, reuse_prompts: bool = True):
        """Makes an engine for texts of up to max_length tokens, prompts included."""
        capacity = padded_length(max_length)
        super().__init__(model, num_slots=num_slots, min_capacity=capacity, modes=_MODES, reuse_prompts=reuse_prompts)
        self.reuses_prompts = self.prompts.is_used

    def lower(
        self,
        widths: Sequence[int],
        groups: Sequence[int],
        needs: Sequence[tuple[Mode, int | None]],
        *,
        extend: bool = False,
    ) -> Iterator[Lowered]:
        """Traces, without running, the programs that serve certain prompts, for the caller to compile.

        Args:
            widths: padded lengths of the prompts.
            groups: numbers of prompts that are prefilled together.
            needs: sampling modes, each with a number of likeliest tokens to report.
            extend: also trace the programs that reuse prefixes.
        """
        # Results of committed arrays are committed, and a call with arguments committed otherwise would recompile.
        sharding = next((array.sharding for array in self._weights if array.committed), None)
        if self._devices > 1:
            # As the compiler writes it, for example without axes of size 1.
            sharding = jax.jit(split_tokens)(np.zeros(self._devices)).sharding
        shape = lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
        shapes = lambda lowered: jax.tree.map(shape, lowered.out_info)
        capacity, state, fresh, inserted = self._min_capacity, None, {}, set()
        reads = sorted({(self._group(1, width, group), width, width) for group in groups for width in widths})
        if extend:
            sizes = extended_sizes(capacity)
            reads += sorted({(self._group(1, size, group), size, width) for group in groups for size, width in sizes})
        for group, size, width in reads:
            tokens, lengths = np.zeros((group, size), np.int32), np.ones(group, np.int32)
            if width < size and state is not None:
                held = state.cache, lengths, lengths
                read = self._programs.extend.lower(self._weights, *held, tokens, lengths, width=width)
            else:
                read = self._program_for(tokens).lower(self._weights, tokens, lengths)
            yield read
            logits, uses, cache = shapes(read)
            rows = Rows.of([None] * group)
            for mode, num_top in needs if group not in fresh else ():
                yield (started := programs.start.lower(logits, lengths, uses, rows, mode=mode, num_top=num_top))
                fresh[group] = shapes(started)[0]
            arguments = fresh[group]._replace(cache=cache), lengths
            room = {"num_rows": self._num_rows, "capacity": capacity}
            if state is None:
                yield (first := programs.insert.lower(None, *arguments, **room))
                state = shapes(first)
            if (group, size) not in inserted:
                yield programs.insert.lower(state, *arguments, **room)
                inserted.add((group, size))
        for mode, num_top in needs if state is not None else ():
            arguments = self._weights, state, np.zeros(self._num_rows, bool), np.int32(1)
            yield self._programs.decode.lower(*arguments, mode=mode, num_top=num_top)


def warm_up(
    engine: ServingEngine,
    *,
    max_length: int,
    lengths: Collection[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compiles the programs for greedy and random sampling on all cores, and runs the largest prefill to test memory.

    Afterwards the engine holds no texts, and reuses no prompts until the programs of `lower_rest` are compiled.

    Args:
        engine: the engine.
        max_length: maximum tokens of a text, prompt included.
        lengths: lengths of the expected prompts; None: all below max_length.
        progress: is called with the number of programs compiled so far and their total.
    """
    widths, groups = _sizes(engine, lengths or range(1, max_length))
    engine.prompts.is_used = False
    with ThreadPoolExecutor(os.cpu_count(), "memjax-compile") as pool:
        # Tracing is serial; compilation releases the GIL and overlaps with it.
        usual = [(mode, None) for mode in _USUAL]
        compiling = [pool.submit(program.compile) for program in engine.lower(widths, groups, usual)]
        for done, compiled in enumerate(as_completed(compiling), 1):
            compiled.result()
            progress(done, len(compiling))
    # The longest prompts that leave room for two tokens, if there are any.
    length = min(max_length - 1, max(widths[-1] // 2 + 1, min(widths[-1], max_length - 2)))
    slots = engine.insert([Request(prompt_ids=[0] * length, max_tokens=max_length - length)] * groups[-1])
    engine.step(1)
    for slot in slots:
        engine.release(slot)


def lower_rest(engine: ServingEngine, scorer: PromptScorer, *, max_length: int) -> Iterator[Lowered]:
    """Traces the remaining programs: for reused prefixes, penalties and log-probabilities, and scored prompts.

    The caller compiles each before it asks for the next; prefixes are reused once their programs are compiled.
    """
    widths, groups = _sizes(engine, range(1, max_length))
    if engine.reuses_prompts:
        yield from engine.lower(widths, groups, [(_MODES[0], None)], extend=True)
        engine.prompts.is_used = True
    counts = top_counts(engine.vocab_size)
    likely = [(mode, count) for count in counts for mode in _MODES]
    yield from engine.lower(widths, groups, [(_MODES[-1], None), *likely])
    yield from itertools.starmap(scorer.lower, itertools.product(widths, counts))


def _sizes(engine: Engine, lengths: Collection[int]) -> tuple[list[int], list[int]]:
    """Padded lengths of prompts, and sizes of the groups in which they are prefilled."""
    return sorted({padded_length(length) for length in lengths}), sorted({1, prefill_rows(engine.num_slots)})
