"""Which implementation of an operation runs.

An implementation is a module `memjax.ops.<operation>.<name>` with a function named like the operation. A named wish is
met or refused, never swapped; only `None` may choose, and takes the first of IMPLEMENTATIONS that can run.
"""

import importlib
from types import ModuleType

from memjax.ops import triton_call

IMPLEMENTATIONS = ("triton", "xla", "reference")
"""In the order of preference."""


def choose(operation: str, wanted: str | None) -> str:
    """The name of the implementation that runs.

    Raises:
        ValueError: `wanted` is unknown.
        NotImplementedError: `wanted` is known but cannot run here; the message says why.
    """
    if wanted is None:
        return "xla" if triton_call.why_not(interpreted_will_do=False) else "triton"
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: implementation={wanted!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}")
    if reason := why_not(wanted):
        raise NotImplementedError(f"{operation}: implementation={wanted!r} cannot run: {reason}")
    return wanted


def why_not(name: str) -> str | None:
    """Why an implementation cannot run here, in words; None when it can."""
    return triton_call.why_not() if name == "triton" else None


def load(operation: str, name: str) -> ModuleType:
    """The module that implements an operation."""
    return importlib.import_module(f"memjax.ops.{operation}.{name}")
