"""The errors that users can mend, and the exit codes of the commands that meet them."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line a problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class DataError(Exception):
    """The data cannot be used; the message says where, what is wrong, and what to do."""


class CheckpointError(Exception):
    """A checkpoint cannot be written, found or read; the message names folder, step, item and the way out."""
