"""How generated tokens are picked."""

import dataclasses

from memjax.config.checks import not_negative, positive, refuse, typed


# Without slots, so that the settings of a command can inherit from it and from another class.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token of a text is picked."""

    temperature: float = 0.0
    """0 always takes the likeliest token; 1 draws from the model's own probabilities."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens; null for all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together, after top_k."""
    repetition_penalty: float = 1.0
    """Divides the positive scores of tokens that the text holds already, multiplies the negative ones
    (arXiv:1909.05858)."""
    seed: int = 0
    """Of the draws; the same seed writes the same text."""

    def __post_init__(self) -> None:
        typed(self)
        refuse(self.problems())

    def problems(self) -> list[str | None]:
        """Everything that is wrong with the settings."""
        return [
            *not_negative(temperature=self.temperature),
            *positive(top_k=self.top_k, repetition_penalty=self.repetition_penalty),
            f"top_p={self.top_p} must be above 0 and at most 1" if not 0 < self.top_p <= 1 else None,
        ]
