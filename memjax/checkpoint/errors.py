"""What goes wrong with checkpoints, told with folder, step and item."""

import contextlib
from collections.abc import Iterator

import jax

from memjax.errors import CheckpointError


class Damaged(CheckpointError):
    """What is on disk is not what was saved, so an older step may do."""


@contextlib.contextmanager
def explained(kind: type[CheckpointError], what: str) -> Iterator[None]:
    """Raises what goes wrong inside as an error of this kind, which begins with `what`."""
    try:
        yield
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # explained already, or too little memory, which is no fault of the step
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise kind(f"{what} ({reason})") from error
