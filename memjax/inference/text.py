"""Generate text from prompts, up to the model's end token, a stop string or a number of tokens."""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Literal

from memjax.config import checks
from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.decoding import StreamingDecoder
from memjax.inference.engine import Engine
from memjax.inference.requests import Request
from memjax.inference.sampling import GREEDY
from memjax.inference.streaming import Pace, generate
from memjax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """The text that a model wrote after a prompt."""

    text: str
    """Without the prompt and without the stop string."""
    finish: Literal["end", "stop", "length"]
    """Why it ends: the model ended it, a stop string came, or max_tokens were written."""
    tokens: int
    """Tokens written, those of the stop string included."""


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    sampling: SamplingConfig = GREEDY,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    number: int = 0,
) -> Generator[str, None, int]:
    """Yields pieces of the text that follows a prompt; what may turn out to be a stop string is held back.

    The generator returns the number of tokens that were written.

    Args:
        model: the model.
        tokenizer: the one it was trained with.
        prompt: the text to continue.
        max_tokens: the most tokens to write.
        sampling: how tokens are picked; by default the likeliest.
        stop: strings that end the text; special tokens may be named too.
        special_tokens: whether the names of special tokens in the prompt mean these.
        number: of the prompt; with the seed it decides the draws.
    """
    prompt_ids, stop = _prompt_ids(tokenizer, prompt, special_tokens), checks.several(stop)
    text = _Text(tokenizer, prompt_ids, stop)
    stop_ids = _stop_ids(tokenizer, stop)
    for token in generate(
        model, prompt_ids, max_tokens=max_tokens, sampling=sampling, stop_ids=stop_ids, number=number
    ):
        yield text.push(token)
        if text.is_stopped:
            return text.num_tokens
    yield text.finish()
    return text.num_tokens


def continue_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    *,
    max_tokens: int,
    sampling: SamplingConfig = GREEDY,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    batch_size: int = 8,
    max_prompt_tokens: int | None = None,
) -> Iterator[Continuation]:
    """Yields the continuation of every prompt, in their order; the arguments are those of `stream_text`.

    A prompt's place in the list is its number, so the batch size changes no text. Of a prompt of more than
    max_prompt_tokens the last ones are read.

    Raises:
        ValueError: a number is not a whole one, or out of its range.
        TypeError: a prompt is no text.
    """
    checks.refuse(
        checks.counts(batch_size=batch_size)
        + ([] if max_prompt_tokens is None else checks.counts(max_prompt_tokens=max_prompt_tokens))
        + (checks.whole_number(max_tokens=max_tokens) or checks.not_negative(max_tokens=max_tokens))
    )
    prompts, stop = list(checks.several(prompts)), checks.several(stop)
    if not max_tokens:
        yield from (Continuation(text="", finish="length", tokens=0) for _ in prompts)
        return
    stop_ids = frozenset(_stop_ids(tokenizer, stop))
    read = slice(None) if max_prompt_tokens is None else slice(-max_prompt_tokens, None)
    num_slots = max(1, min(batch_size, len(prompts)))
    # Where more wait, half a batch is read at a time: as soon as that many texts have ended, others take their slots.
    at_once = num_slots if num_slots == len(prompts) else max(1, num_slots // 2)
    engine, pace = Engine(model, num_slots=num_slots, prefill_rows=at_once), Pace()
    running: dict[int, tuple[int, _Text]] = {}
    """By slot: the number of the prompt, and its text."""
    ended: dict[int, Continuation] = {}
    next_read = next_told = 0
    while next_told < len(prompts):
        first_new = next_read
        while next_read < len(prompts):
            some = prompts[next_read : next_read + at_once]
            if next_read < num_slots:
                some = some[: num_slots - next_read]
            if len(some) > len(engine.free_slots):
                break
            ids = [_prompt_ids(tokenizer, prompt, special_tokens)[read] for prompt in some]
            requests = [
                Request(prompt_ids=one, max_tokens=max_tokens, sampling=sampling, stop_ids=stop_ids, number=number)
                for number, one in enumerate(ids, next_read)
            ]
            for slot, request in zip(engine.insert(requests), requests, strict=True):
                running[slot] = request.number, _Text(tokenizer, request.prompt_ids, stop)
            next_read += len(ids)
        # The time that prompts take says nothing about that of tokens.
        for slot, made in (pace.step(engine) if next_read == first_new else engine.step(0)).items():
            number, text = running[slot]
            for token in made.tokens:
                text.push(token)
            if text.is_stopped:
                engine.release(slot)
            if text.is_stopped or made.finish is not None:
                del running[slot]
                ended[number] = text.ended(max_tokens)
        while next_told in ended:
            yield ended.pop(next_told)
            next_told += 1


def _prompt_ids(tokenizer: Tokenizer, prompt: str, special_tokens: bool) -> list[int]:
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a text, found {type(prompt).__name__}; continue_texts takes a list of them")
    encode = tokenizer.encode_with_special if special_tokens else tokenizer.encode
    return tokenizer.prompt(encode(prompt))


def _stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    return {*tokenizer.end_ids, *(tokenizer.special_tokens[name] for name in stop if name in tokenizer.special_tokens)}


class _Text:
    """A running continuation: decodes its tokens and applies stop strings."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]):
        self.text = ""
        self.num_tokens = 0
        self._decoder = StreamingDecoder(tokenizer, after=prompt_ids)
        self._stops = StopStrings(stop)

    @property
    def is_stopped(self) -> bool:
        return self._stops.found is not None

    def push(self, token: int) -> str:
        """The new text that a token completes; nothing once a stop string was found."""
        if self.is_stopped:
            return ""
        self.num_tokens += 1
        return self._add(self._stops.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The text held back so far."""
        return self._add(self._stops.push(self._decoder.finish()) + self._stops.finish())

    def ended(self, max_tokens: int) -> Continuation:
        """The finished text, once it has its last token."""
        self.finish()
        finish = "stop" if self.is_stopped else "length" if self.num_tokens == max_tokens else "end"
        return Continuation(text=self.text, finish=finish, tokens=self.num_tokens)

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece


class StopStrings:
    """Passes a text on, piece by piece, up to a stop string; a piece is what a token adds.

    As lm-eval does it, the text ends with the first piece that completes a stop string. Where that piece completes
    several, the text is cut in front of the first of them in the order in which they are given, and what is left in
    front of the next, if it is still there.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        """The stop string that cut the text."""
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that can be passed on now: all but an end that may begin a stop string."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        for stop in self._stops:
            before, found, _ = text.partition(stop)
            if found:
                text, self.found = before, stop
        self._held = "" if self.found is not None else text[len(text) - self._beginning(text) :]
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """The text still held back: the beginning of a stop string that did not complete."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """How many of the last letters are the beginning of a stop string, at the most."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        fits = lambda length: any(stop.startswith(text[len(text) - length :]) for stop in self._stops)
        return next((length for length in range(longest, 0, -1) if fits(length)), 0)
