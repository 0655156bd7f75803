"""How long JAX compiles, for which a first call waits but no later one."""

import contextlib
from collections.abc import Callable, Iterator

import jax.monitoring

_EVENTS = {f"/jax/core/compile/{name}_duration" for name in ("jaxpr_to_mlir_module", "backend_compile")}
"""Lowering, which compiles Triton kernels, and XLA. Tracing is left out, because its events overlap."""


@contextlib.contextmanager
def compile_seconds() -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds that all threads have compiled since the block was entered."""
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
