"""Requests to an engine, and the tokens it returns."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from memjax.config import checks
from memjax.config.sampling import SamplingConfig
from memjax.inference.sampling import GREEDY
from memjax.models.token_ids import check_ids


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A text to write."""

    prompt_ids: Sequence[int]
    """The prompt, its begin token included."""
    max_tokens: int
    """The most tokens to write."""
    sampling: SamplingConfig = GREEDY
    stop_ids: Collection[int] = ()
    """Tokens that end the text; they are not part of it."""
    number: int = 0
    """Number of the prompt; with the seed it decides the draws."""
    logprobs: int | None = None
    """Number of likeliest tokens to report with each token's own log-probability; None reports nothing."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities (natural) of the model at one position, before any sampling setting."""

    chosen: float
    """Log-probability of the written token."""
    top: dict[int, float]
    """Log-probabilities of the likeliest tokens, in falling order."""


@dataclasses.dataclass(slots=True)
class Made:
    """Tokens that one step added to a text."""

    tokens: list[int]
    finish: Literal["stop", "length"] | None = None
    """Why the text ends with these tokens: a stop token came, or max_tokens are written. None: it continues."""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """Of each token in `tokens`, if requested."""
    stop: tuple[int, TokenLogprobs | None] | None = None
    """The stop token that came, which is no part of the text, with its log-probabilities if the request asks."""
    num_reused: int = 0
    """With a text's first tokens: how many of the prompt's were in the cache, and not read again."""


def check(request: Request, vocab_size: int) -> None:
    """Raises a ValueError, or a TypeError for sampling of another type, if a request cannot be served."""
    if not len(request.prompt_ids):
        raise ValueError(f"the ids of prompt {request.number} are empty; they need at least the begin token")
    check_ids(request.prompt_ids, vocab_size, f"the ids of prompt {request.number}")
    checks.refuse(checks.counts(max_tokens=request.max_tokens))
    if not isinstance(request.sampling, SamplingConfig):
        raise TypeError(f"sampling must be a memjax.SamplingConfig, found {type(request.sampling).__name__}")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocab_size:
        raise ValueError(f"logprobs={request.logprobs} must be in 0..{vocab_size}, the tokens of the vocabulary")
