"""The engine of a server, and the compilation of its programs before requests come."""

import itertools
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from jax.stages import Lowered

from memjax.config.sampling import SamplingConfig
from memjax.inference.engine import Engine
from memjax.inference.programs import padded_length, top_counts
from memjax.inference.requests import Request
from memjax.inference.sampling import Mode
from memjax.inference.scheduler import prefill_rows
from memjax.inference.scoring import PromptScorer
from memjax.models.decoder import Decoder
from memjax.sharding.axes import has_memory_axis

_USUAL = Mode(), Mode(draws=True, top_k=True, top_p=True)
_MODES = *_USUAL, Mode(True, True, True, True)
"""Sampling modes of a server: few programs, so that no request waits for a compilation for long."""


def make_engine(model: Decoder, *, num_slots: int, max_length: int) -> Engine:
    """An engine with one decoding program for each of `_MODES`, whose texts are at most max_length tokens long."""
    return Engine(model, num_slots=num_slots, min_capacity=padded_length(max_length), modes=_MODES)


def warm_up(
    engine: Engine,
    *,
    max_length: int,
    lengths: Collection[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compiles what greedy and drawn texts need, on all cores, and reads the largest group of prompts once, so that
    memory is known to suffice. Afterwards the engine is as before.

    `lengths` are those of the prompts to come; None stands for all below max_length. `progress` is called with the
    number of programs that are compiled and the number of all.
    """
    widths, groups = _sizes(engine, lengths or range(1, max_length))
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


def lower_rest(engine: Engine, scorer: PromptScorer, *, max_length: int) -> Iterator[Lowered]:
    """What texts with log-probabilities or penalties, and scored prompts, need besides: traced, to be compiled."""
    widths, groups = _sizes(engine, range(1, max_length))
    counts = top_counts(engine.vocab_size)
    likely = [(mode, count) for count in counts for mode in _MODES]
    yield from engine.lower(widths, groups, [(_MODES[-1], None), *likely])
    yield from itertools.starmap(scorer.lower, itertools.product(widths, counts))


def _sizes(engine: Engine, lengths: Collection[int]) -> tuple[list[int], list[int]]:
    """Padded lengths of prompts, and how many are read together."""
    return sorted({padded_length(length) for length in lengths}), sorted({1, prefill_rows(engine.num_slots)})
