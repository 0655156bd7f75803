"""Generate text from prompts, up to the model's end token, a stop string or a maximum number of tokens."""

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Literal

from memjax.config import checks
from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.decoding import StreamingDecoder
from memjax.inference.engine import Engine
from memjax.inference.programs import padded_length
from memjax.inference.requests import Request
from memjax.inference.sampling import GREEDY
from memjax.inference.score_rows import num_shared
from memjax.inference.streaming import Pace, generate
from memjax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """The text that a model generated after a prompt."""

    text: str
    """Without the prompt and without the stop string."""
    finish: Literal["end", "stop", "length"]
    """Why it ends: at the model's end token, at a stop string, or at max_tokens."""
    tokens: int
    """Number of tokens generated, those of the stop string included."""


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
    """Yields pieces of the text that follows a prompt; text that may turn out to be a stop string is held back.

    The generator's return value is the number of tokens generated.

    Args:
        model: the model.
        tokenizer: the tokenizer it was trained with.
        prompt: the text to continue.
        max_tokens: maximum number of tokens to generate.
        sampling: how tokens are chosen; by default the likeliest.
        stop: strings that end the text; may include names of special tokens.
        special_tokens: whether names of special tokens in the prompt are encoded as these tokens.
        number: index of the prompt; together with the seed it determines the random draws.
    """
    prompt_ids, stop = _prompt_ids(tokenizer, prompt, special_tokens), checks.several(stop)
    text = GeneratedText(tokenizer, prompt_ids, stop)
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
    """Yields the continuation of each prompt, in order; other arguments are those of `stream_text`.

    A prompt's `number` is its index in the list, so the batch size changes no text. Prompts of more than
    max_prompt_tokens tokens are truncated from the left.

    Raises:
        ValueError: a number is not an integer or out of range.
        TypeError: a prompt is not a string.
    """
    checks.refuse(
        checks.counts(batch_size=batch_size)
        + ([] if max_prompt_tokens is None else checks.counts(max_prompt_tokens=max_prompt_tokens))
        + (checks.whole_number(max_tokens=max_tokens) or checks.not_negative(max_tokens=max_tokens))
    )
    stop, read = checks.several(stop), slice(None) if max_prompt_tokens is None else slice(-max_prompt_tokens, None)
    prompt_ids = [_prompt_ids(tokenizer, prompt, special_tokens)[read] for prompt in checks.several(prompts)]
    if not max_tokens:
        yield from (Continuation(text="", finish="length", tokens=0) for _ in prompt_ids)
        return
    stop_ids = frozenset(_stop_ids(tokenizer, stop))
    num_slots = max(1, min(batch_size, len(prompt_ids)))
    # With more prompts than slots, half a batch is prefilled at a time, as soon as that many slots are free.
    at_once = num_slots if num_slots == len(prompt_ids) else max(1, num_slots // 2)
    longest = max(map(len, prompt_ids), default=0)
    reuse: dict[str, Any] = {}
    if len(prompt_ids) >= 2 * num_slots and max_tokens <= longest and _begin_alike(prompt_ids):
        # Only then is it worth the compilation of further programs, and a cache of the final size from the start.
        reuse = {"reuse_prompts": True, "min_capacity": padded_length(longest + max_tokens)}
    engine, pace = Engine(model, num_slots=num_slots, prefill_rows=at_once, **reuse), Pace()
    running: dict[int, tuple[int, GeneratedText]] = {}
    """By slot: index of the prompt, and its text."""
    ended: dict[int, Continuation] = {}
    next_read = next_told = 0
    while next_told < len(prompt_ids):
        first_new = next_read
        while next_read < len(prompt_ids):
            some = prompt_ids[next_read : next_read + at_once]
            if next_read < num_slots:
                some = some[: num_slots - next_read]
            if len(some) > len(engine.free_slots):
                break
            requests = [
                Request(prompt_ids=one, max_tokens=max_tokens, sampling=sampling, stop_ids=stop_ids, number=number)
                for number, one in enumerate(some, next_read)
            ]
            for slot, request in zip(engine.insert(requests), requests, strict=True):
                running[slot] = request.number, GeneratedText(tokenizer, request.prompt_ids, stop)
            next_read += len(some)
        # The time of a prefill says nothing about that of decoding, so the pace ignores it.
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


def _begin_alike(prompts: Iterable[list[int]]) -> bool:
    """Whether prompts share more than half of their tokens with others, at their beginnings."""
    ordered = sorted(prompts)
    return 2 * sum(itertools.starmap(num_shared, itertools.pairwise(ordered))) > sum(map(len, ordered))


def _stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    return {*tokenizer.end_ids, *(tokenizer.special_tokens[name] for name in stop if name in tokenizer.special_tokens)}


class GeneratedText:
    """A running continuation: decodes its tokens and applies stop strings."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]):
        self.text = ""
        """The text passed on so far."""
        self.num_tokens = 0
        """Tokens generated, those of a stop string included."""
        self.num_decoded = 0
        """Characters decoded so far, those held back or cut off included."""
        self._decoder = StreamingDecoder(tokenizer, after=prompt_ids)
        self._stops = StopStrings(stop)

    @property
    def is_stopped(self) -> bool:
        return self._stops.found is not None

    def push(self, token: int) -> str:
        """The new text that a token completes; empty once a stop string was found."""
        if self.is_stopped:
            return ""
        self.num_tokens += 1
        piece = self._decoder.push(token)
        self.num_decoded += len(piece)
        return self._add(self._stops.push(piece))

    def finish(self) -> str:
        """The text held back so far; nothing after a stop string."""
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
    """Passes on a text, one token's piece at a time, up to a stop string.

    As in lm-eval, the first piece that completes a stop string ends the text. If it completes several, the text is cut
    before the first of them in the given order, then before the next if it is still present.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        """The stop string that cut the text (the last, if several did)."""
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that can be passed on now: all but a suffix that may be the start of a stop string."""
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
        """The text still held back: the start of a stop string that was not completed."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest suffix of the text that is a proper prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        fits = lambda length: any(stop.startswith(text[len(text) - length :]) for stop in self._stops)
        return next((length for length in range(longest, 0, -1) if fits(length)), 0)
