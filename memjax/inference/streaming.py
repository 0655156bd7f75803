"""Stream the tokens of one prompt as soon as they are made."""

import time
from collections.abc import Collection, Iterator, Sequence

from memjax.config.sampling import SamplingConfig
from memjax.inference.engine import Engine
from memjax.inference.programs import LONGEST_CHUNK
from memjax.inference.requests import Made, Request, check
from memjax.inference.sampling import GREEDY
from memjax.models.decoder import Decoder

_CHUNK_SECONDS = 0.05
"""Streams ask for more tokens at a time as long as a chunk takes less, so that text never comes in jerks."""


class Pace:
    """How many tokens a stream takes at a time: one at first, then ever more, as long as that takes but a moment."""

    def __init__(self, seconds: float = _CHUNK_SECONDS):
        """Begins with a single token, and requests no more than fit in that many seconds."""
        self.tokens, self._seconds = 1, seconds

    def step(self, engine: Engine, most: int = LONGEST_CHUNK) -> dict[int, Made]:
        """The engine's next tokens, `most` of each text at the most."""
        count, began = min(self.tokens, most), time.monotonic()
        made = engine.step(count)
        seconds = time.monotonic() - began
        if seconds >= self._seconds:
            self.tokens = max(1, count // 2)
        elif seconds < self._seconds / 2:
            # Doubled only where twice the time is still a moment.
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
    # A function of its own, so that the checks run at the call and not at the first token.
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
