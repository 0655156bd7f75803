"""Bodies of OpenAI's `/v1/completions`: requests are checked, and choices written as the interface has them."""

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import StreamingDecoder, Tokenizer
from memjax.inference.engine import Request, TokenLogprobs
from memjax.inference.scheduler import Ticket, Update
from memjax.inference.text import StopStrings

MOST_LOGPROBS = 20
_TOP_COUNTS = (5, MOST_LOGPROBS)
"""Likeliest tokens that are asked of the engine, so that few programs compile."""
_MOST_STOPS, _LONGEST_STOP = 16, 256
_MOST_SHOWN = 8
"""Problems of one body that are listed."""

FIELDS = {
    "add_special_tokens": True,
    "best_of": None,
    "echo": False,
    "frequency_penalty": 0,
    "ignore_eos": False,
    "logit_bias": None,
    "logprobs": None,
    "max_tokens": None,
    "model": None,
    "n": 1,
    "presence_penalty": 0,
    "prompt": None,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": None,
    "stream": False,
    "stream_options": None,
    "suffix": None,
    "temperature": 1.0,
    "top_k": None,
    "top_p": 1.0,
    "user": None,
}
"""Fields of a request with their defaults, which null means too."""

_DEFAULT_TOKENS = 16
_HALF = "holds half of a surrogate pair, which no text can hold; send UTF-8"
Prompt = str | tuple[int, ...]


class RefusedError(Exception):
    """A request that is not served: an HTTP status and the error object of OpenAI's interface."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        kind = "authentication_error" if status == 401 else kind
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """A request whose fields are well-formed."""

    prompts: tuple[Prompt, ...]
    model: str | None
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int | None
    repetition_penalty: float
    seed: int | None
    n: int
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    ignore_eos: bool
    add_special_tokens: bool

    @property
    def num_choices(self) -> int:
        """Texts that are asked for."""
        return self.n * len(self.prompts)


def parse_json(body: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
        RefusedError: the body is no JSON object in UTF-8, names a field twice, or holds NaN or infinity.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RefusedError(f"the body is not UTF-8 (byte {error.start}); send a JSON object in UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise RefusedError(f"the body is not JSON ({why}); send an object such as {_EXAMPLE}") from None
    if not isinstance(found, dict):
        raise RefusedError(f"the body is {_kind(found)}, not a JSON object; send one such as {_EXAMPLE}")
    return found


_EXAMPLE = '{"prompt": "Once", "max_tokens": 16}'


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return found


class _Fields:
    """Reads the fields of a body and collects what is wrong with them."""

    def __init__(self, body: Mapping[str, Any], known: Mapping[str, Any]):
        self.problems: list[tuple[str, str]] = []
        self._values = {**known, **{name: value for name, value in body.items() if value is not None and name in known}}
        for name in body:
            if name not in known:
                self.refuse(
                    _short(name), f"{shown(name)} is no field of this request; known: {', '.join(sorted(known))}"
                )

    def refuse(self, name: str, message: str) -> None:
        self.problems.append((name, message))

    def any(self, name: str) -> Any:
        return self._values[name]

    def wrong(self, name: str, rule: str) -> None:
        self.refuse(name, f"{name}={shown(self._values[name])} must be {rule}")

    def flag(self, name: str) -> bool:
        if not isinstance(self._values[name], bool):
            self.wrong(name, "true or false")
        return self._values[name] is True

    def whole(self, name: str, low: int, high: int | None, rule: str) -> Any:
        """The whole number, or None where there is none or a wrong one."""
        value = self._values[name]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            self.wrong(name, rule)
            return None
        return value

    def number(self, name: str, low: float, high: float, rule: str, *, above: bool = False) -> float:
        value = self._values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Integers may be too large for a float.
        if not is_number or not (low < value if above else low <= value) or not value <= high:
            self.wrong(name, rule)
            return high
        return float(value)

    def text(self, name: str) -> str | None:
        value = self._values[name]
        if value is not None and not isinstance(value, str):
            self.wrong(name, "a string")
            return None
        return value

    def finish(self) -> None:
        """Raises a RefusedError if anything was refused."""
        if self.problems:
            lines = [message for _, message in self.problems[:_MOST_SHOWN]]
            if len(self.problems) > _MOST_SHOWN:
                lines.append(f"and {len(self.problems) - _MOST_SHOWN:,} more")
            raise RefusedError("\n".join(lines), param=self.problems[0][0])


def parse_request(body: Mapping[str, Any], *, vocab_size: int, max_choices: int) -> CompletionRequest:
    """A request of well-formed fields.

    Args:
        body: the JSON object.
        vocab_size: ids of prompts are below it.
        max_choices: the most texts that one request may ask for.

    Raises:
        RefusedError: with all that is wrong; its `param` is the first such field.
    """
    fields = _Fields(body, FIELDS)
    prompts = _prompts(fields, vocab_size)
    n = fields.whole("n", 1, None, "a whole number above 0") or 1
    if n * len(prompts) > max_choices:
        many = f"{shown(n)} times {len(prompts):,} prompts"
        fields.refuse("n", f"n={many} is more than the {max_choices:,} texts of one request; send several requests")
    _refuse_what_is_not_served(fields, n)
    stream, options = fields.flag("stream"), fields.any("stream_options")
    include_usage = False
    if options is not None:
        if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
            fields.wrong("stream_options", 'an object such as {"include_usage": true}')
        elif not isinstance(options.get("include_usage", False), bool):
            fields.wrong("stream_options", "include_usage must be true or false; see {'include_usage': true}")
        elif not stream:
            fields.wrong("stream_options", "left out where stream is false")
        else:
            include_usage = options.get("include_usage", False)
    top_k = fields.whole("top_k", -1, None, "a whole number above 0, or 0 or -1 for all tokens")
    found = CompletionRequest(
        prompts=prompts,
        model=fields.text("model"),
        max_tokens=fields.whole("max_tokens", 0, None, "a whole number that is not negative"),
        # Logits divided by less overflow; the likeliest token is certain long before.
        temperature=_at_least(1e-4, fields.number("temperature", 0.0, 2.0, "a number in 0..2")),
        top_p=max(1e-6, fields.number("top_p", 0.0, 1.0, "a number above 0 and at most 1", above=True)),
        top_k=top_k if top_k and top_k > 0 else None,
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100.0, "a number in 0.01..100; 1 changes nothing"),
        seed=fields.whole("seed", -(1 << 63), (1 << 63) - 1, "a whole number of 64 bits"),
        n=n,
        stop=_stops(fields),
        logprobs=fields.whole("logprobs", 0, MOST_LOGPROBS, f"a whole number in 0..{MOST_LOGPROBS}"),
        echo=fields.flag("echo"),
        stream=stream,
        include_usage=include_usage,
        ignore_eos=fields.flag("ignore_eos"),
        add_special_tokens=fields.flag("add_special_tokens"),
    )
    fields.text("user")
    if found.max_tokens == 0 and not found.echo:
        fields.wrong("max_tokens", "above 0 unless echo is true: nothing would come back")
    fields.finish()
    return found


def parse_tokenize(body: Mapping[str, Any]) -> tuple[str, bool]:
    """The text to encode, and whether the begin token goes in front of it.

    Raises:
        RefusedError: a field is missing or wrong.
    """
    fields = _Fields(body, {"add_special_tokens": True, "model": None, "prompt": None})
    text, adds = fields.text("prompt"), fields.flag("add_special_tokens")
    if fields.any("prompt") is None:
        fields.refuse("prompt", "prompt is missing; it must be a string")
    elif text is not None and not _is_unicode(text):
        fields.refuse("prompt", f"prompt {_HALF}")
    fields.finish()
    return text or "", adds


def parse_detokenize(body: Mapping[str, Any], *, vocab_size: int) -> list[int]:
    """The ids to decode.

    Raises:
        RefusedError: a field is missing or wrong.
    """
    fields = _Fields(body, {"model": None, "tokens": None})
    ids = fields.any("tokens")
    if not isinstance(ids, list) or not all(_is_id(token) and 0 <= token < vocab_size for token in ids):
        fields.wrong("tokens", f"a list of whole numbers in 0..{vocab_size - 1}")
    fields.finish()
    return ids


def _at_least(smallest: float, temperature: float) -> float:
    return temperature if temperature >= smallest else 0.0


def _prompts(fields: _Fields, vocab_size: int) -> tuple[Prompt, ...]:
    value = fields.any("prompt")
    rule = "a string, a list of strings, a list of token ids or a list of such lists"
    if value is None:
        fields.refuse("prompt", f"prompt is missing; it must be {rule}")
        return ()
    prompts = value if isinstance(value, list) and not all(map(_is_id, value)) else [value]
    is_one_kind = all(isinstance(one, str) for one in prompts) or all(isinstance(one, list) for one in prompts)
    if value == [] or not is_one_kind:
        fields.wrong("prompt", rule)
        return ()
    found: list[Prompt] = []
    for number, one in enumerate(prompts):
        name = f"prompt {number}" if len(prompts) > 1 else "prompt"
        if isinstance(one, str):
            if not _is_unicode(one):
                fields.refuse("prompt", f"{name} {_HALF}")
            found.append(one)
        elif not all(map(_is_id, one)):
            wrong = next(token for token in one if not _is_id(token))
            fields.refuse("prompt", f"{name} holds {shown(wrong)} among its token ids; they must be whole numbers")
        elif outside := next((token for token in one if not 0 <= token < vocab_size), None):
            known = f"the model knows 0..{vocab_size - 1}"
            fields.refuse("prompt", f"{name} holds the token id {shown(outside)}; {known}")
        else:
            found.append(tuple(one))
    return tuple(found)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_what_is_not_served(fields: _Fields, n: int) -> None:
    if fields.any("best_of") not in (None, n) or isinstance(fields.any("best_of"), bool):
        fields.wrong("best_of", f"left out or n={n}: the server ranks no texts; ask for n of them with logprobs")
    for name in ("presence_penalty", "frequency_penalty"):
        if isinstance(fields.any(name), bool) or fields.any(name) != 0:
            fields.wrong(name, "left out or 0: it is not served; repetition_penalty is")
    if fields.any("logit_bias") not in (None, {}):
        fields.wrong("logit_bias", "left out or empty: it is not served")
    if fields.any("suffix") not in (None, ""):
        fields.wrong("suffix", "left out or empty: the model only goes on from prompts")


def _stops(fields: _Fields) -> tuple[str, ...]:
    value = fields.any("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    rule = f"a string or at most {_MOST_STOPS} strings, each of 1 to {_LONGEST_STOP} characters"
    is_list = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not is_list or not all(isinstance(one, str) and 0 < len(one) <= _LONGEST_STOP for one in stops):
        fields.wrong("stop", rule)
        return ()
    if not all(map(_is_unicode, stops)):
        fields.refuse("stop", f"stop {_HALF}")
    return tuple(stops)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value of a request as JSON, cut to a line; control characters are escaped."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "a number of more than 70 digits"
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{_kind(value)} with {len(value):,} entries"
    if isinstance(value, str):
        return json.dumps(_short(value))
    try:
        return _short(json.dumps(value))
    except (ValueError, RecursionError):
        return _kind(value)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def prompt_ids(tokenizer: Tokenizer, request: CompletionRequest) -> list[tuple[list[int], int]]:
    """The ids of each prompt as the model reads them, and how many of the first are the server's own begin token.

    Raises:
        RefusedError: a prompt is empty and may not be given a begin token.
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
    """The texts that a request asks for, in the order of their indices.

    Raises:
        RefusedError: a prompt leaves no room for max_tokens.
    """
    stop_names = [name for name in request.stop if name in tokenizer.special_tokens]
    stop_ids = {tokenizer.special_tokens[name] for name in stop_names}
    stop_ids |= set() if request.ignore_eos else set(tokenizer.end_ids)
    choices = []
    for number, (ids, num_added) in enumerate(prompts):
        room = max_length - len(ids)
        wanted = request.max_tokens if request.max_tokens is not None else max(1, min(_DEFAULT_TOKENS, room))
        if wanted > room:
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise RefusedError(
                f"{name} has {len(ids):,} tokens, and max_tokens={shown(wanted)} more do not fit into the "
                f"{max_length:,} that this server takes; shorten the prompt or ask for at most {max(0, room):,}",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        # Without a seed no two texts are drawn alike; with one, each is what its prompt gets alone.
        seed = request.seed if request.seed is not None else secrets.randbits(32)
        sampling = SamplingConfig(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
            seed=seed,
        )
        top = None
        if request.logprobs is not None:
            top = next(count for count in _TOP_COUNTS if count >= request.logprobs)
        for copy in range(request.n):
            engine_request = Request(
                prompt_ids=ids,
                max_tokens=wanted,
                sampling=sampling,
                stop_ids=frozenset(stop_ids),
                number=copy,
                logprobs=top,
            )
            ticket = Ticket(request=engine_request, prompt_top=top if request.echo else None)
            prompt = request.prompts[number]
            choices.append(Choice(tokenizer, request, ticket, index=len(choices), num_added=num_added, prompt=prompt))
    return choices


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """The next part of a choice: what an event of a stream carries, or all of it."""

    text: str
    logprobs: dict[str, list[Any]] | None
    finish: str | None


class Choice:
    """A text in the making.

    The tokens' log-probabilities come with the text that they belong to: those of a text that a stop string cuts off
    never come.
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
    ):
        self.ticket, self.index = ticket, index
        self.num_tokens = 0
        """Tokens written, those of a stop string included."""
        self.is_done = False
        self._tokenizer, self._num_top, self._echo = tokenizer, request.logprobs, request.echo
        self._num_added, self._prompt = num_added, prompt
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._decoder = StreamingDecoder(tokenizer, after=ticket.request.prompt_ids)
        self._stops = StopStrings(request.stop)
        self._decoded, self._given = 0, 0
        """Letters of the text that tokens have made, and those that were passed on."""
        self._held: list[tuple[int, int, TokenLogprobs | None]] = []
        """Where each token begins in the text, the token, and its log-probabilities; of those not yet passed on."""
        self._begun = False

    def add(self, update: Update) -> Piece:
        """The part that an update brings; it may be empty."""
        text = ""
        if not self._begun and (self._echo and (update.prompt is not None or self._num_top is None)):
            text += self._begin(update.prompt)
        likely = iter(update.made.logprobs)
        for token in update.made.tokens:
            if self._stops.found is not None:
                break
            self.num_tokens += 1
            self._held.append((self._decoded, token, next(likely, None)))
            piece = self._decoder.push(token)
            self._decoded += len(piece)
            text += self._stops.push(piece)
        if update.made.stop is not None and self._stops.found is None:
            # No part of the text, but a token that was made: clients count on one entry for each.
            self._held.append((self._decoded, *update.made.stop))
        finish = "stop" if self._stops.found is not None else update.made.finish
        if finish is not None and not self.is_done:
            if self._stops.found is None:
                text += self._stops.push(self._decoder.finish()) + self._stops.finish()
                finish = "stop" if self._stops.found is not None else finish
            self.is_done = True
        self._given += len(text)
        return Piece(text, self._logprobs(), finish)

    def _begin(self, scores: list[TokenLogprobs] | None) -> str:
        """The prompt, which the client wants back."""
        self._begun = True
        ids = self.ticket.request.prompt_ids
        decoder = StreamingDecoder(self._tokenizer, after=ids[: self._num_added])
        text = self._prompt if isinstance(self._prompt, str) else ""
        for place in range(self._num_added, len(ids)):
            start = self._decoded
            piece = decoder.push(ids[place])
            self._decoded += len(piece)
            if not isinstance(self._prompt, str):
                text += piece
            if scores is not None:
                # The first token of all follows nothing.
                self._held.append((start, ids[place], scores[place - 1] if place else None))
        if not isinstance(self._prompt, str):
            text += decoder.finish()
        # A tokenizer may lose letters of a text.
        self._decoded = len(text)
        return text

    def _logprobs(self) -> dict[str, list[Any]] | None:
        """The log-probabilities of tokens whose text was passed on."""
        if self._num_top is None:
            self._held = []
            return None
        is_cut = self._stops.found is not None
        is_given = lambda start: start < self._given or (self.is_done and not is_cut)
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
        """The likeliest tokens by their text, and the token itself."""
        found: dict[str, float] = {}
        for other in list(likely.top)[: self._num_top]:
            found.setdefault(self._shown(other), _finite(likely.top[other]))
        found.setdefault(self._shown(token), _finite(likely.chosen))
        return found

    def _shown(self, token: int) -> str:
        """A token's text; its bytes where they are no whole characters."""
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
    """A number that JSON can carry: log-probabilities of impossible tokens are minus infinity."""
    return value if math.isfinite(value) else -9999.0
