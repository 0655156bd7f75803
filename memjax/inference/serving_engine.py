"""The engine of a server, and the compilation of its programs before requests come."""

import itertools
from collections.abc import Callable, Collection

from memjax.config.sampling import SamplingConfig
from memjax.inference.engine import Engine
from memjax.inference.programs import padded_length
from memjax.inference.requests import Request
from memjax.inference.sampling import Mode
from memjax.inference.scheduler import prefill_rows
from memjax.models.decoder import Decoder

_MODES = (Mode(), Mode(draws=True, top_k=True, top_p=True), Mode(True, True, True, True))
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
    """Compiles what greedy and drawn texts need; afterwards the engine is as before.

    `lengths` are those of the prompts to come; None stands for all below max_length. `progress` is called with the
    number of steps that are done and the number of all.
    """
    samplings = (SamplingConfig(), SamplingConfig(temperature=1.0, top_p=0.5))
    widths = sorted({padded_length(length) for length in lengths or range(1, max_length)})
    steps = list(itertools.product(widths, sorted({1, prefill_rows(engine.num_slots)}), samplings))
    for done, (width, rows, sampling) in enumerate(steps):
        progress(done, len(steps))
        # Of the longest texts that are padded to the width; with two tokens to write, where there is room for them.
        length = min(max_length - 1, max(width // 2 + 1, min(width, max_length - 2)))
        request = Request(prompt_ids=[0] * length, max_tokens=max_length - length, sampling=sampling)
        slots = engine.insert([request] * rows)
        engine.step(1)
        for slot in slots:
            engine.release(slot)
    progress(len(steps), len(steps))
