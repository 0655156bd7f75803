"""Sampling settings."""

import dataclasses
from collections.abc import Iterator

from memjax.config.section import NotNegative, Positive, Section, Share


# Without slots, so that a command's settings can inherit from this and another class.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How the next token is chosen."""

    temperature: NotNegative[float] = 0.0
    """0: greedy; 1: the model's own probabilities."""
    top_k: Positive[int] | None = None
    """Sample from this many most likely tokens; null: all."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this total probability, after top_k."""
    min_p: Share[float] = 0.0
    """Sample only from tokens with at least this share of the likeliest token's probability, before top_k and top_p; 0:
    all."""
    repetition_penalty: float = 1.0
    """Divisor of the positive logits of tokens already in the text, and factor on negative ones (arXiv:1909.05858);
    0.01 to 100."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated before; -2 to 2."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token generated before; -2 to 2."""
    seed: int = 0
    """Seed of the sampling; the same seed gives the same text."""

    def problems(self) -> Iterator[str]:
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p} must be above 0 and at most 1"
        if not 0.01 <= self.repetition_penalty <= 100:
            yield f"repetition_penalty={self.repetition_penalty} must be in 0.01..100; 1 changes nothing"
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                yield f"{name}={getattr(self, name)} must be in -2..2; 0 changes nothing"
