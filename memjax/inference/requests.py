"""Requests to an engine and the tokens it returns."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from memjax.config import checks
from memjax.config.sampling import SamplingConfig
from memjax.inference.sampling import GREEDY, MOST_BIASES
from memjax.models.token_ids import check_ids

MOST_STOPS = 1024
"""Maximum number of stop tokens per text."""
MOST_BIAS = 100


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A text to generate."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt, including the begin token."""
    max_tokens: int
    """Maximum number of tokens to generate."""
    sampling: SamplingConfig = GREEDY
    stop_ids: Collection[int] = ()
    """Tokens that end the text, at most 1,024; they are not part of it."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these tokens, at most 300; -100 bans a token, 100 forces it."""
    number: int = 0
    """Index of the prompt; together with the seed it determines the random draws."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report besides each token's own log-probability; None: report nothing."""


class TokenLogprobs(NamedTuple):
    """The model's log-probabilities (natural) at one position, before biases, penalties, temperature and truncation."""

    chosen: float
    """Log-probability of the generated token."""
    top: dict[int, float]
    """Log-probabilities of the likeliest tokens, in descending order."""


@dataclasses.dataclass(slots=True)
class Made:
    """Tokens that one step added to a text."""

    tokens: list[int]
    finish: Literal["stop", "length"] | None = None
    """Why the text ends after these tokens: at a stop token, or at max_tokens. None: it continues."""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """Log-probabilities of each token in `tokens`, if requested."""
    stop: tuple[int, TokenLogprobs | None] | None = None
    """The stop token that ended the text, which is not part of it, with its log-probabilities if requested."""
    num_reused: int = 0
    """Reported with a text's first tokens: how many prompt tokens were reused from the cache."""


def check(request: Request, vocab_size: int) -> None:
    """Raises a ValueError for an invalid request, or a TypeError if `sampling` has the wrong type."""
    if not len(request.prompt_ids):
        raise ValueError(f"the ids of prompt {request.number} are empty; they need at least the begin token")
    check_ids(request.prompt_ids, vocab_size, f"the ids of prompt {request.number}")
    checks.refuse(checks.counts(max_tokens=request.max_tokens))
    if not isinstance(request.sampling, SamplingConfig):
        raise TypeError(f"sampling must be a memjax.SamplingConfig, found {type(request.sampling).__name__}")
    for name, most in (("stop_ids", MOST_STOPS), ("logit_bias", MOST_BIASES)):
        if (count := len(getattr(request, name))) > most:
            raise ValueError(f"{name} holds {count:,} tokens; it may hold at most {most:,}")
    check_ids(list(request.logit_bias), vocab_size, "the ids of logit_bias")
    if wrong := [bias for bias in request.logit_bias.values() if not abs(bias) <= MOST_BIAS]:
        raise ValueError(f"logit_bias holds {wrong[0]}; a bias must be in -{MOST_BIAS}..{MOST_BIAS}")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocab_size:
        raise ValueError(f"logprobs={request.logprobs} must be in 0..{vocab_size}, the tokens of the vocabulary")
