"""Stream the tokens that follow a prompt as they are generated."""

import time
from collections.abc import Collection, Iterator, Sequence

from memjax.config.sampling import SamplingConfig
from memjax.inference.engine import Engine
from memjax.inference.programs import LONGEST_CHUNK
from memjax.inference.requests import Made, Request, check
from memjax.inference.sampling import GREEDY
from memjax.models.decoder import Decoder

_CHUNK_SECONDS = 0.05
"""Chunks of a stream grow only while they take less time than this, so that text streams smoothly."""


class Pace:
    """Adapts the number of tokens per engine step: one at first, then more, within a time limit."""

    def __init__(self, seconds: float = _CHUNK_SECONDS):
        """Aims for steps shorter than `seconds`."""
        self.tokens, self._seconds = 1, seconds

    def step(self, engine: Engine, most: int = LONGEST_CHUNK) -> dict[int, Made]:
        """Steps the engine: at most `most` further tokens of each text."""
        count, began = min(self.tokens, most), time.monotonic()
        made = engine.step(count)
        seconds = time.monotonic() - began
        if seconds >= self._seconds:
            self.tokens = max(1, count // 2)
        elif seconds < self._seconds / 2:
            # Doubled only if twice the time is still within the limit.
            self.tokens = min(max(self.tokens, 2 * count), LONGEST_CHUNK)
        return made


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: SamplingConfig = GREEDY,
    stop_ids: Collection[int] = (),
    number: int = 0,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, soon after they are generated.

    Rotary positions are unbounded, so the text may be longer than training sequences; the only limit is the memory of
    the cache.

    Args:
        model: the model.
        prompt_ids: the prompt, including the begin token.
        max_tokens: maximum number of tokens to generate.
        sampling: how tokens are chosen; by default the likeliest.
        stop_ids: tokens that end the text; they are not yielded.
        number: index of the prompt; together with the seed it determines the random draws.

    Raises:
        ValueError: the prompt is empty or holds ids outside the vocabulary, or max_tokens is negative.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative")
    request = Request(
        prompt_ids=prompt_ids,
        max_tokens=max(1, max_tokens),
        sampling=sampling,
        stop_ids=frozenset(stop_ids),
        number=number,
    )
    check(request, model.config.vocab_size)
    # In a separate function, so that the checks run at the call and not at the first token.
    return _tokens(model, request) if max_tokens else iter(())


def _tokens(model: Decoder, request: Request) -> Iterator[int]:
    engine = Engine(model, num_slots=1, prefill_rows=1)
    engine.insert([request])
    made, pace = engine.step(0), Pace()
    while True:
        for added in made.values():
            yield from added.tokens
        if not engine.is_busy:
            return
        made = pace.step(engine)
