"""Turn completion requests into engine requests, and the engine's tokens into pieces of the response."""

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Any

from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.decoding import StreamingDecoder
from memjax.inference.bodies import RefusedError, shown
from memjax.inference.completions import CompletionRequest, Prompt
from memjax.inference.requests import Request, TokenLogprobs
from memjax.inference.scheduler import Ticket, Update
from memjax.inference.text import GeneratedText

_DEFAULT_TOKENS = 16


def prompt_ids(tokenizer: Tokenizer, request: CompletionRequest) -> list[tuple[list[int], int]]:
    """The token ids of each prompt, and how many begin tokens the server has added to them.

    Raises:
        RefusedError: a prompt is empty, and add_special_tokens is false.
    """
    found = []
    for prompt in request.prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        whole = tokenizer.prompt(ids) if request.add_special_tokens else ids
        if not whole:
            rule = "must hold a token where add_special_tokens is false; leave that out to begin with the begin token"
            raise RefusedError(f"prompt={shown(prompt)} {rule}", param="prompt")
        found.append((whole, len(whole) - len(ids)))
    return found


def make_choices(
    tokenizer: Tokenizer, request: CompletionRequest, prompts: Sequence[tuple[list[int], int]], *, max_length: int
) -> list["Choice"]:
    """The choices that a request asks for, in the order of their indices.

    Raises:
        RefusedError: a prompt leaves no room for max_tokens.
    """
    stop_ids = {*request.stop_token_ids, *(() if request.ignore_eos else tokenizer.end_ids)}
    stop_ids |= {tokenizer.special_tokens[name] for name in request.stop if name in tokenizer.special_tokens}
    choices = []
    for number, (ids, num_added) in enumerate(prompts):
        room = max_length - len(ids)
        wanted = request.max_tokens if request.max_tokens is not None else max(1, min(_DEFAULT_TOKENS, room))
        if wanted > room:
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise RefusedError(
                f"{name} has {len(ids):,} tokens, and max_tokens={shown(wanted)} more do not fit into the "
                f"{max_length:,} that this server accepts; shorten the prompt"
                + (f" or ask for at most {room:,}" if room > 0 else ""),
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        # Without a seed, each prompt gets a random one; with one, each prompt gets the result it would get alone.
        seed = request.seed if request.seed is not None else secrets.randbits(32)
        sampling = dataclasses.replace(request.sampling, seed=seed)
        for copy in range(request.n):
            engine_request = Request(
                prompt_ids=ids,
                max_tokens=wanted,
                sampling=sampling,
                stop_ids=frozenset(stop_ids),
                logit_bias=request.logit_bias,
                number=copy,
                logprobs=request.logprobs,
            )
            # The prompt is scored once, for the first copy, which leaves the queue before the others.
            first = choices[-copy] if copy else None
            ticket = Ticket(request=engine_request, prompt_top=request.logprobs if request.echo and not copy else None)
            prompt = request.prompts[number]
            choices.append(
                Choice(tokenizer, request, ticket, index=len(choices), num_added=num_added, prompt=prompt, first=first)
            )
    return choices


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """The next part of a choice, for one event of a stream; or all of it."""

    text: str
    logprobs: dict[str, list[Any]] | None
    finish: str | None


class Choice:
    """One choice of a completion: decodes its tokens, applies stop strings, reports log-probabilities.

    Log-probabilities are passed on with the text of their tokens; those of text cut off by a stop string never are.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: CompletionRequest,
        ticket: Ticket,
        *,
        index: int,
        num_added: int,
        prompt: Prompt,
        first: "Choice | None" = None,
    ):
        """`first`: the choice of the same prompt with whose text the prompt's log-probabilities are computed."""
        self.ticket, self.index = ticket, index
        self.generated = GeneratedText(tokenizer, ticket.request.prompt_ids, request.stop)
        self.num_reused = 0
        """Prompt tokens that were reused from the cache."""
        self.is_done = False
        self._tokenizer, self._num_top, self._echo = tokenizer, request.logprobs, request.echo
        self._num_added, self._prompt = num_added, prompt
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._echoed, self._given = 0, 0
        """Characters of the prompt that precede the text, and characters passed on so far."""
        self._held: list[tuple[int, int, TokenLogprobs | None]] = []
        """Tokens not yet passed on: offset in the text, token, log-probabilities."""
        self._begun = False
        self._first = self if first is None else first
        self._scores: list[TokenLogprobs] | None = None
        """Log-probabilities of the prompt's tokens after the first, of the first choice of a prompt."""

    def add(self, update: Update) -> Piece:
        """The next piece of the choice after an update; it may be empty."""
        text = ""
        if update.prompt is not None:
            self._scores = update.prompt
        if self._echo and not self._begun:
            text += self._begin(self._first._scores)
        self.num_reused += update.made.num_reused
        likely = iter(update.made.logprobs)
        for token in update.made.tokens:
            if self.generated.is_stopped:
                break
            self._held.append((self._echoed + self.generated.num_decoded, token, next(likely, None)))
            text += self.generated.push(token)
        if update.made.stop is not None and not self.generated.is_stopped:
            # A stop token is not part of the text, but clients rely on one entry per generated token.
            self._held.append((self._echoed + self.generated.num_decoded, *update.made.stop))
        finish = "stop" if self.generated.is_stopped else update.made.finish
        if finish is not None and not self.is_done:
            text += self.generated.finish()
            finish = "stop" if self.generated.is_stopped else finish
            self.is_done = True
        self._given += len(text)
        return Piece(text, self._logprobs(), finish)

    def _begin(self, scores: list[TokenLogprobs] | None) -> str:
        """The text of the prompt, for `echo`; also records its tokens and their log-probabilities."""
        self._begun = True
        ids = self.ticket.request.prompt_ids
        decoder = StreamingDecoder(self._tokenizer, after=ids[: self._num_added])
        text = self._prompt if isinstance(self._prompt, str) else ""
        for place in range(self._num_added, len(ids)):
            start = self._echoed
            piece = decoder.push(ids[place])
            self._echoed += len(piece)
            if not isinstance(self._prompt, str):
                text += piece
            if scores is not None:
                # Nothing precedes the very first token, so it has no log-probability.
                self._held.append((start, ids[place], scores[place - 1] if place else None))
        if not isinstance(self._prompt, str):
            text += decoder.finish()
        # Decoding a prompt's tokens may not give back all its characters.
        self._echoed = len(text)
        return text

    def _logprobs(self) -> dict[str, list[Any]] | None:
        """Log-probabilities of the tokens whose text is passed on now."""
        if self._num_top is None:
            self._held = []
            return None
        is_whole = self.is_done and not self.generated.is_stopped
        is_given = lambda start: is_whole or start < self._given
        given = [one for one in self._held if is_given(one[0])]
        self._held = [one for one in self._held if not is_given(one[0])]
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for start, token, likely in given:
            found["tokens"].append(self._shown(token))
            found["token_logprobs"].append(None if likely is None else _finite(likely.chosen))
            found["top_logprobs"].append(None if likely is None else self._top(token, likely))
            found["text_offset"].append(start)
        return found

    def _top(self, token: int, likely: TokenLogprobs) -> dict[str, float]:
        """Log-probabilities of the likeliest tokens and of the token itself, by text."""
        found: dict[str, float] = {}
        for other, value in likely.top.items():
            found.setdefault(self._shown(other), _finite(value))
        found.setdefault(self._shown(token), _finite(likely.chosen))
        return found

    def _shown(self, token: int) -> str:
        """A token's text, or its bytes if they are not complete characters."""
        if token in self._names:
            return self._names[token]
        piece = self._tokenizer.token_bytes(token)
        if not piece:
            return f"token:{token}"
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(value: float) -> float:
    """The value, or a large negative number: JSON has no infinity, the log-probability of impossible tokens."""
    return value if math.isfinite(value) else -9999.0
