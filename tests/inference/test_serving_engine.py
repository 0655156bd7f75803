"""A server's engine has its programs before requests come."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.model import ModelConfig
from memjax.inference.requests import Request
from memjax.inference.serving_engine import make_engine, warm_up
from memjax.models.parts import DecoderParts

COMPILED = "/jax/core/compile/backend_compile_duration"


def test_a_warm_engine_compiles_nothing_for_prompts_of_any_length():
    config = ModelConfig(dim=8, num_layers=1, num_heads=1, ffn_dim=8, vocab_size=11, dtype="float32", memory=None)
    parts = DecoderParts.of(config)
    fill = lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype)
    engine = make_engine(parts.merge(jax.tree.map(fill, parts.abstract_params), {}), num_slots=2, max_length=33)
    warm_up(engine, max_length=33)
    compiled = []
    # JAX offers no way to take one listener back; this one only adds to a list.
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

    def write(lengths: Sequence[int], stop_ids: Sequence[int] = ()) -> None:
        engine.insert([Request(prompt_ids=[5] * length, max_tokens=2, stop_ids=stop_ids) for length in lengths])
        while engine.is_busy:
            engine.step(4)

    for lengths in ([3], [17, 17], [32], [31, 30]):
        write(lengths)
    assert compiled.count(COMPILED) == 0
    # Room for many stop tokens, which takes programs of its own, is given back.
    write([3], stop_ids=range(5))
    write([3])
    compiled.clear()
    write([32])
    assert compiled.count(COMPILED) == 0
    jax.jit(lambda x: x * 3 + 1)(np.ones(3))
    assert compiled.count(COMPILED) == 1
