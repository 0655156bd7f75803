"""Tokens one by one, as soon as they are made: of one prompt, or of several side by side."""

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

    def __init__(self) -> None:
        """Begins with a single token."""
        self.tokens = 1

    def step(self, engine: Engine, most: int = LONGEST_CHUNK) -> dict[int, Made]:
        """The engine's next tokens, `most` of each text at the most."""
        count, began = min(self.tokens, most), time.monotonic()
        made = engine.step(count)
        seconds = time.monotonic() - began
        # Doubled only where twice the time is still a moment.
        grown = 2 * count if seconds < _CHUNK_SECONDS / 2 else count if seconds < _CHUNK_SECONDS else count // 2
        self.tokens = min(max(1, grown), LONGEST_CHUNK)
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
        made = pace.step(engine)
