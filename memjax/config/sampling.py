"""Settings of the sampling of tokens."""

import dataclasses

from memjax.config.section import NotNegative, Positive, Section


# Without slots, so that the settings of a command can inherit from it and from another class.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How the next token of a text is picked."""

    temperature: NotNegative[float] = 0.0
    """0 always takes the likeliest token; 1 draws from the model's own probabilities."""
    top_k: Positive[int] | None = None
    """Draw from this many of the likeliest tokens; null for all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together, after top_k."""
    repetition_penalty: float = 1.0
    """Divides the positive scores of tokens that the text holds already, multiplies the negative ones
    (arXiv:1909.05858); 0.01 to 100."""
    seed: int = 0
    """Seed of the draws; the same seed writes the same text."""

    def problems(self) -> list[str | None]:
        """Everything that is wrong with the settings."""
        return [
            None if 0 < self.top_p <= 1 else f"top_p={self.top_p} must be above 0 and at most 1",
            None
            if 0.01 <= self.repetition_penalty <= 100
            else f"repetition_penalty={self.repetition_penalty} must be in 0.01..100; 1 changes nothing",
        ]
