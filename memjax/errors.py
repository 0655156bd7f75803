"""Errors that users can fix."""

from collections.abc import Sequence

_MOST_CHARACTERS = 4000
MOST_SHOWN = 40
"""Maximum number of problems listed: a file of the wrong kind has thousands."""


class ConfigError(ValueError):
    """All problems of a config, one per line."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(shown(self.problems)))


def shown(problems: Sequence[str], most: int = MOST_SHOWN) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - most
    return [*problems[:most], *([f"and {more:,} more"] if more > 0 else [])]


class _ShortError(Exception):
    """An error whose message is truncated, as it may quote foreign files."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


class DataError(_ShortError):
    """The data cannot be used; the message says where, why, and what to do."""


class CheckpointError(_ShortError):
    """A checkpoint cannot be written, found or read; the message names folder, step, item and remedy."""
