"""Parse and validate the request bodies of OpenAI's `/v1/completions`, and of /tokenize and /detokenize."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memjax.config.sampling import SamplingConfig
from memjax.inference.bodies import Fields, shown
from memjax.inference.requests import MOST_BIAS
from memjax.inference.sampling import MOST_BIASES

_MOST_LOGPROBS = 20
_MOST_STOPS, _LONGEST_STOP, _MOST_STOP_IDS = 16, 256, 512

_FIELDS = {
    "add_special_tokens": True,
    "best_of": None,
    "echo": False,
    "frequency_penalty": 0,
    "ignore_eos": False,
    "logit_bias": {},
    "logprobs": None,
    "max_tokens": None,
    "min_p": 0.0,
    "model": None,
    "n": 1,
    "presence_penalty": 0,
    "prompt": None,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": [],
    "stream": False,
    "stream_options": None,
    "suffix": None,
    "temperature": 1.0,
    "top_k": None,
    "top_p": 1.0,
    "user": None,
}
"""Fields of a request with their defaults, which null also selects."""

_HALF = "holds half of a surrogate pair, which no text can hold; send UTF-8"
Prompt = str | tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """A request whose fields are well-formed."""

    prompts: tuple[Prompt, ...]
    model: str | None
    max_tokens: int | None
    sampling: SamplingConfig
    """Without the seed."""
    seed: int | None
    logit_bias: Mapping[int, float]
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    ignore_eos: bool
    add_special_tokens: bool


def parse_request(body: Mapping[str, Any], *, vocab_size: int, max_choices: int) -> CompletionRequest:
    """The request in a body, for at most max_choices texts.

    Raises:
        RefusedError: a field is unknown or invalid. It lists all problems, and its `param` is the first such field.
    """
    fields = Fields(body, _FIELDS)
    prompts = _prompts(fields, vocab_size)
    n = fields.integer("n", 1, None, "a whole number above 0") or 1
    if n * len(prompts) > max_choices:
        many = f"{shown(n)} times {len(prompts):,} prompts"
        fields.refuse("n", f"n={many} is more than the {max_choices:,} texts of one request; send several requests")
    _refuse_what_is_not_served(fields, n)
    stream = fields.flag("stream")
    include_usage = _include_usage(fields, stream)
    most_logprobs = min(_MOST_LOGPROBS, vocab_size)
    found = CompletionRequest(
        prompts=prompts,
        model=fields.text("model"),
        max_tokens=fields.integer("max_tokens", 0, None, "a whole number that is not negative"),
        sampling=_sampling(fields),
        seed=fields.integer("seed", -(1 << 63), (1 << 63) - 1, "a whole number of 64 bits"),
        logit_bias=_logit_bias(fields, vocab_size),
        n=n,
        stop=_stops(fields),
        stop_token_ids=_stop_token_ids(fields, vocab_size),
        logprobs=fields.integer("logprobs", 0, most_logprobs, f"a whole number in 0..{most_logprobs}"),
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
    """The text to encode, and whether to prepend the begin token.

    Raises:
        RefusedError: a field is missing or wrong.
    """
    fields = Fields(body, {"add_special_tokens": True, "model": None, "prompt": None})
    text, adds = fields.text("prompt"), fields.flag("add_special_tokens")
    if fields.value("prompt") is None:
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
    fields = Fields(body, {"model": None, "tokens": None})
    ids = fields.value("tokens")
    if not isinstance(ids, list) or not _are_ids(ids) or _outside(ids, vocab_size):
        fields.wrong("tokens", f"a list of whole numbers in 0..{vocab_size - 1}")
    fields.finish()
    return ids


def _sampling(fields: Fields) -> SamplingConfig:
    temperature = fields.number("temperature", 0.0, 2.0, "a number in 0..2")
    top_k = fields.integer("top_k", -1, None, "a whole number above 0, or 0 or -1 for all tokens")
    return SamplingConfig(
        # Logits divided by less would overflow; the likeliest token is certain long before that.
        temperature=temperature if temperature >= 1e-4 else 0.0,
        top_p=max(1e-6, fields.number("top_p", 0.0, 1.0, "a number above 0 and at most 1", above=True)),
        top_k=min(top_k, 1 << 31) if top_k and top_k > 0 else None,
        min_p=fields.number("min_p", 0.0, 1.0, "a number in 0..1; 0 keeps all tokens"),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100.0, "a number in 0.01..100; 1 changes nothing"),
        frequency_penalty=fields.number("frequency_penalty", -2.0, 2.0, "a number in -2..2; 0 changes nothing"),
        presence_penalty=fields.number("presence_penalty", -2.0, 2.0, "a number in -2..2; 0 changes nothing"),
    )


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.value("stream_options")
    if options is None:
        return False
    # Unknown options that are switched off are harmless.
    options = options if isinstance(options, dict) else {"": True}
    used = {name: value for name, value in options.items() if value is not None and value is not False}
    include_usage = used.pop("include_usage", False)
    if used or not isinstance(include_usage, bool):
        fields.wrong("stream_options", 'an object such as {"include_usage": true}, where nothing else is true')
    elif not stream:
        fields.wrong("stream_options", "left out if stream is false")
    return include_usage is True


def _prompts(fields: Fields, vocab_size: int) -> tuple[Prompt, ...]:
    value = fields.value("prompt")
    rule = "a string, a list of strings, a list of token ids or a list of such lists"
    if value is None:
        fields.refuse("prompt", f"prompt is missing; it must be {rule}")
        return ()
    prompts = value if isinstance(value, list) and not _are_ids(value) else [value]
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
        elif not _are_ids(one):
            wrong = next(token for token in one if not _are_ids([token]))
            fields.refuse("prompt", f"{name} holds {shown(wrong)} among its token ids; they must be whole numbers")
        elif outside := _outside(one, vocab_size):
            known = f"the model knows 0..{vocab_size - 1}"
            fields.refuse("prompt", f"{name} holds the token id {shown(outside[0])}; {known}")
        else:
            found.append(tuple(one))
    return tuple(found)


def _are_ids(values: list[Any]) -> bool:
    """Whether all values are integers (and not bool); compares sets of types, because prompts have thousands of ids."""
    return set(map(type, values)) <= {int}


def _outside(ids: list[int], vocab_size: int) -> list[int]:
    """The first id outside the vocabulary, or an empty list."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return []
    return [next(token for token in ids if not 0 <= token < vocab_size)]


def _refuse_what_is_not_served(fields: Fields, n: int) -> None:
    if fields.value("best_of") not in (None, n) or isinstance(fields.value("best_of"), bool):
        fields.wrong("best_of", f"left out or n={n}: the server ranks no texts; ask for n of them with logprobs")
    if fields.value("suffix") not in (None, ""):
        fields.wrong("suffix", "left out or empty: the model only continues prompts")


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.value("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    rule = f"a string or at most {_MOST_STOPS} strings, each of 1 to {_LONGEST_STOP} characters"
    is_list = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not is_list or not all(isinstance(one, str) and 0 < len(one) <= _LONGEST_STOP for one in stops):
        fields.wrong("stop", rule)
        return ()
    if not all(map(_is_unicode, stops)):
        fields.refuse("stop", f"stop {_HALF}")
    return tuple(stops)


def _stop_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = fields.value("stop_token_ids")
    if isinstance(ids, list) and len(ids) <= _MOST_STOP_IDS and _are_ids(ids) and not _outside(ids, vocab_size):
        return tuple(ids)
    fields.wrong("stop_token_ids", f"a list of at most {_MOST_STOP_IDS} whole numbers in 0..{vocab_size - 1}")
    return ()


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    """The biases by token; JSON has the ids as strings."""
    value, found = fields.value("logit_bias"), {}
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        fields.wrong("logit_bias", f'an object such as {{"5": -100}}, with at most {MOST_BIASES} token ids')
        return {}
    for name, bias in value.items():
        is_id = name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size
        if not is_id or int(name) in found:
            rule = f"whole numbers in 0..{vocab_size - 1}, each once"
            fields.refuse("logit_bias", f"logit_bias holds the token id {shown(name)}; they must be {rule}")
            return {}
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= MOST_BIAS:
            rule = f"a number in -{MOST_BIAS}..{MOST_BIAS}"
            fields.refuse("logit_bias", f"logit_bias holds {shown(bias)} for token {name}; it must be {rule}")
            return {}
        found[int(name)] = float(bias)
    return found


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
