"""Which implementation of an operation runs.

An implementation is a module `memjax.ops.<operation>.<name>` with the functions that the operation's `api` calls. A
requested implementation runs or raises; it is never substituted. None takes the first of IMPLEMENTATIONS that can run.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import jax.numpy as jnp
from jax.typing import DTypeLike

from memjax.config import checks
from memjax.ops import triton_call
from memjax.ops.table import Table

IMPLEMENTATIONS = ("triton", "xla", "reference")
"""In order of preference."""


def choose(operation: str, wanted: str | None, dtype: DTypeLike = jnp.float32) -> str:
    """The name of the implementation to run: the wanted one, or for None the fastest that can run here.

    Raises:
        ValueError: `wanted` is unknown.
        NotImplementedError: `wanted` is known but cannot run here; the message says why.
    """
    if wanted is None:
        # Triton's interpreter is for tests, so it must be requested by name.
        return "xla" if triton_call.is_interpreted() or why_not("triton", dtype) else "triton"
    return named(f"{operation}: implementation", wanted, IMPLEMENTATIONS, lambda name: why_not(name, dtype))


def named(label: str, wanted: str, known: Sequence[str], reason_against: Callable[[str], str | None]) -> str:
    """The implementation `wanted`, if it is known and can run; `label` starts the messages.

    Raises:
        ValueError: `wanted` is unknown.
        NotImplementedError: `wanted` cannot run here.
    """
    if wanted not in known:
        raise ValueError(f"{label}={wanted!r} is unknown; known: {', '.join(known)}")
    if reason := reason_against(wanted):
        raise NotImplementedError(f"{label}={wanted!r} cannot run: {reason}")
    return wanted


def problems(implementation: str | None) -> list[str]:
    """Problems of an `implementation` argument, for `checks.refuse`: none if it is None or known."""
    return [] if implementation is None else checks.one_of(IMPLEMENTATIONS, implementation=implementation)


def choose_for(operation: str, wanted: str | None, table: Table) -> str:
    """`choose` for an operation that reads a table.

    Raises:
        ValueError: `wanted` is unknown.
        NotImplementedError: `wanted` cannot run here, or the chosen implementation cannot read the table.
    """
    name = choose(operation, wanted, table.dtype)
    if table.pinned is not None and name != "triton":
        reason = why_not("triton", table.dtype) or "another implementation was requested"
        raise NotImplementedError(
            f"{operation}: implementation={name!r} cannot read {table.describe()}: only the Triton kernels read pinned "
            f"host memory, and they do not run ({reason})"
        )
    return name


def why_not(name: str, dtype: DTypeLike = jnp.float32) -> str | None:
    """The reason why an implementation cannot run here on arrays of this type; None if it can."""
    if name != "triton":
        return None
    if jnp.dtype(dtype) == jnp.float64:
        return "its kernels accumulate in float32, which is too coarse for float64"
    return triton_call.why_not()


def load(operation: str, name: str) -> ModuleType:
    """The module that implements an operation."""
    return importlib.import_module(f"memjax.ops.{operation}.{name}")
