"""Compile time is measured while a block runs, and the listener is removed afterwards."""

import threading

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

from memjax.monitoring.compilation import compile_seconds

LOWERED, COMPILED, TRACED = (
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_to_mlir_module", "backend_compile", "jaxpr_trace")
)


def test_compilations_are_counted_and_cached_programs_are_not():
    @jax.jit
    def program(x):
        return jnp.sin(x) @ x

    x = jnp.ones((3, 3)).block_until_ready()
    with compile_seconds() as spent:
        assert spent() == 0
        program(x)
        assert (first := spent()) > 0
        program(x)
        assert spent() == first


def test_all_threads_count_until_the_block_ends():
    record = jax.monitoring.record_event_duration_secs
    with compile_seconds() as spent:
        record(LOWERED, 1.0)
        record(TRACED, 4.0)
        thread = threading.Thread(target=record, args=(COMPILED, 2.0))
        thread.start()
        thread.join()
    record(COMPILED, 8.0)
    assert spent() == 3.0


def test_nothing_counts_after_an_error():
    def fail(spent):
        heard.append(spent)
        raise KeyError

    heard = []
    with pytest.raises(KeyError), compile_seconds() as spent:
        fail(spent)
    jax.monitoring.record_event_duration_secs(COMPILED, 8.0)
    assert heard[0]() == 0
