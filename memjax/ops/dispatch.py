"""Which implementation of an operation runs.

An implementation is a module `memjax.ops.<operation>.<name>` with a function named like the operation and, where it cannot
run everywhere, a function `why_not() -> str | None`. A named wish is met or refused, never swapped; only `None` may choose.
"""

import importlib
from types import ModuleType

IMPLEMENTATIONS = ("xla", "reference")
"""In the order of preference."""


def choose(operation: str, wanted: str | None) -> str:
    """The name of the implementation that runs.

    Raises:
        ValueError: `wanted` is unknown.
        NotImplementedError: `wanted` is known but cannot run here; the message says why.
    """
    if wanted is None:
        return next(name for name in IMPLEMENTATIONS if why_not(operation, name) is None)
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: implementation={wanted!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}")
    if reason := why_not(operation, wanted):
        raise NotImplementedError(f"{operation}: implementation={wanted!r} cannot run: {reason}")
    return wanted


def why_not(operation: str, name: str) -> str | None:
    """Why an implementation cannot run here, in words; None when it can."""
    check = getattr(load(operation, name), "why_not", None)
    return check() if check else None


def load(operation: str, name: str) -> ModuleType:
    """The module that implements an operation."""
    return importlib.import_module(f"memjax.ops.{operation}.{name}")
