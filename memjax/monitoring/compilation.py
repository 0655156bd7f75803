"""How long JAX compiles: what a first call waits for, and no later one."""

import contextlib
from collections.abc import Callable, Iterator

import jax.monitoring

_EVENTS = {f"/jax/core/compile/{name}_duration" for name in ("jaxpr_to_mlir_module", "backend_compile")}
"""Lowering, which compiles Triton kernels, and XLA. Tracing is left out: its events overlap."""


@contextlib.contextmanager
def compile_seconds() -> Iterator[Callable[[], float]]:
    """Gives a function that tells the seconds spent on compiling since the block was entered, by all threads."""
    spent = 0.0

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal spent
        if event in _EVENTS:
            spent += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
    try:
        yield lambda: spent
    finally:
        jax.monitoring.unregister_event_duration_listener(add)
