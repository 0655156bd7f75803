"""The engine of a server, and the compilation of its programs before requests come."""

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import numpy as np
from jax.stages import Lowered

from memjax.config.sampling import SamplingConfig
from memjax.inference import programs
from memjax.inference.engine import Engine
from memjax.inference.programs import Room, Rows, padded_length, top_counts
from memjax.inference.requests import Request
from memjax.inference.sampling import Mode
from memjax.inference.scheduler import prefill_rows
from memjax.inference.scoring import PromptScorer
from memjax.models.decoder import Decoder
from memjax.sharding.axes import has_memory_axis

_USUAL = Mode(), Mode(draws=True, top_k=True, top_p=True)
_MODES = *_USUAL, Mode(True, True, True, True)
"""Sampling modes of a server: few programs, so that no request waits for a compilation for long."""


class ServingEngine(Engine):
    """An engine with one decoding program for each of `_MODES`, which compiles before requests come.

    The beginning of a prompt that a slot holds is copied from there. That takes one device, and positions whose
    frequencies do not depend on the length of the text.
    """

    def __init__(self, model: Decoder, *, num_slots: int, max_length: int, reuse_prompts: bool = True):
        """Takes texts of at most max_length tokens."""
        super().__init__(model, num_slots=num_slots, min_capacity=padded_length(max_length), modes=_MODES)
        scaling = model.config.rope_scaling
        can_reuse = self._devices == 1 and (scaling is None or scaling.kind not in ("dynamic", "longrope"))
        self.reuses_prompts = self.prompts.is_used = reuse_prompts and can_reuse

    def lower(
        self,
        widths: Sequence[int],
        groups: Sequence[int],
        needs: Sequence[tuple[Mode, int | None]],
        *,
        extend: bool = False,
    ) -> Iterator[Lowered]:
        """The programs for prompts padded to these widths and read in groups of these sizes, each in some modes with a
        number of likeliest tokens to report, and with `extend` those that copy beginnings: traced, to be compiled;
        nothing runs.

        Under a mesh there are only those that read prompts: the compiler decides how the arguments of others are split.
        """
        # What is computed from a committed array is committed, and a call compiles anew where that differs.
        sharding = next((array.sharding for array in self._weights if array.committed), None)
        shape = lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
        shapes = lambda lowered: jax.tree.map(shape, lowered.out_info)
        capacity, state, fresh = self._min_capacity, None, {}
        reads = sorted({(self._group(1, width, group), width, width) for group in groups for width in widths})
        if extend:
            begun = {(self._group(1, capacity, group), capacity, width) for group in groups for width in widths[:-1]}
            reads += sorted(begun)
        for group, size, width in reads:
            tokens, lengths = np.zeros((group, size), np.int32), np.ones(group, np.int32)
            if width < size and state is not None:
                held = state.cache, lengths, lengths
                read = self._programs.extend.lower(self._weights, *held, tokens, lengths, width=width)
            else:
                read = self._program_for(tokens).lower(self._weights, tokens, lengths)
            yield read
            if self._devices > 1:
                continue
            logits, uses, cache = shapes(read)
            rows = Rows.of([None] * group)
            for mode, num_top in needs if group not in fresh else ():
                yield (started := programs.start.lower(logits, lengths, uses, rows, mode=mode, num_top=num_top))
                fresh[group] = shapes(started)[0]
            arguments = fresh[group]._replace(cache=cache), lengths
            room = {"num_rows": self._num_rows, "room": Room(capacity, rows.num_stops)}
            if state is None:
                yield (inserted := programs.insert.lower(None, *arguments, **room))
                state = shapes(inserted)
            yield programs.insert.lower(state, *arguments, **room)
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
    """Compiles what greedy and drawn texts need, on all cores, and reads the largest group of prompts once, so that
    memory is known to suffice. Afterwards the engine is as before, but reuses no prompts until `lower_rest` has been
    compiled.

    `lengths` are those of the prompts to come; None stands for all below max_length. `progress` is called with the
    number of programs that are compiled and the number of all.
    """
    widths, groups = _sizes(engine, lengths or range(1, max_length))
    engine.prompts.is_used = False
    with ThreadPoolExecutor(os.cpu_count(), "memjax-compile") as pool:
        # Python traces one program after the other, while others are compiled without its lock.
        usual = [(mode, None) for mode in _USUAL]
        compiling = [pool.submit(program.compile) for program in engine.lower(widths, groups, usual)]
        for done, compiled in enumerate(as_completed(compiling), 1):
            compiled.result()
            progress(done, len(compiling))
    calls = [(widths[-1], groups[-1], SamplingConfig())]
    if has_memory_axis():
        # Under a mesh most programs can only be compiled when they are called.
        samplings = SamplingConfig(), SamplingConfig(temperature=1.0, top_p=0.5)
        calls = list(itertools.product(widths, groups, samplings))
    for width, rows, sampling in calls:
        # Of the longest texts that are padded to the width; with two tokens to write, where there is room for them.
        length = min(max_length - 1, max(width // 2 + 1, min(width, max_length - 2)))
        request = Request(prompt_ids=[0] * length, max_tokens=max_length - length, sampling=sampling)
        slots = engine.insert([request] * rows)
        engine.step(1)
        for slot in slots:
            engine.release(slot)


def lower_rest(engine: ServingEngine, scorer: PromptScorer, *, max_length: int) -> Iterator[Lowered]:
    """What reused prompts, texts with log-probabilities or penalties, and scored prompts need besides: traced, to be
    compiled one after the other. Prompts are reused once the programs for it are compiled.
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
    """Padded lengths of prompts, and how many are read together."""
    return sorted({padded_length(length) for length in lengths}), sorted({1, prefill_rows(engine.num_slots)})
