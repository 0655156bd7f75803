"""A server's engine compiles its programs before requests arrive."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.model import ModelConfig
from memjax.config.sampling import SamplingConfig
from memjax.inference.engine import Engine
from memjax.inference.requests import Request
from memjax.inference.scheduler import Scheduler
from memjax.inference.scoring import PromptScorer
from memjax.inference.serving_engine import ServingEngine, lower_rest, warm_up
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts

COMPILED = "/jax/core/compile/backend_compile_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def constant(value: float, vocab_size: int = 11, *, committed: bool = False) -> Decoder:
    config = ModelConfig(
        dim=8, num_layers=1, num_heads=1, ffn_dim=8, vocab_size=vocab_size, dtype="float32", memory=None
    )
    parts = DecoderParts.of(config)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), parts.abstract_params)
    # Commits the arrays to a device, as restoring a checkpoint does.
    params = jax.device_put(params, jax.devices()[0]) if committed else params
    return parts.merge(params, {})


@pytest.fixture
def compiled() -> list[str]:
    events: list[str] = []
    # The listener stays registered, which does no harm: it only appends to a list.
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    return events


def write(engine: Engine, lengths: Sequence[int], **settings: Any) -> list[int]:
    """How many tokens of each prompt were reused."""
    slots = engine.insert([Request(prompt_ids=[5] * length, max_tokens=2, **settings) for length in lengths])
    reused = dict.fromkeys(slots, 0)
    while engine.is_busy:
        for slot, made in engine.step(4).items():
            reused[slot] += made.num_reused
    return list(reused.values())


@pytest.mark.parametrize("committed", [False, True])
def test_a_warm_engine_compiles_nothing_for_prompts_of_any_length(compiled, committed):
    engine = ServingEngine(constant(0.1, committed=committed), num_slots=2, max_length=33)
    told: list[tuple[int, int]] = []
    compiled.clear()
    warm_up(engine, max_length=33, progress=lambda done, total: told.append((done, total)))
    # Two widths and two group sizes: 4 prefills, 5 inserts (one into an empty engine), 4 starts and 2 decoding loops.
    assert told == [(done, 4 + 5 + 4 + 2) for done in range(1, 16)]
    # One more, an insert of two prompts into the empty engine, is compiled when the largest group is tried.
    assert compiled.count(LOWERED) == 15 + 1
    compiled.clear()
    for lengths in ([3], [17, 17], [32], [31, 30]):
        write(engine, lengths)
        write(engine, lengths, sampling=SamplingConfig(temperature=1.0, top_k=3, top_p=0.5))
        write(engine, lengths, sampling=SamplingConfig(temperature=1.0, min_p=0.5), stop_ids=range(1, 1025))
    assert compiled.count(COMPILED) == 0
    jax.jit(lambda x: x * 3 + 1)(np.ones(3))
    assert compiled.count(COMPILED) == 1


def test_the_less_usual_programs_are_compiled_while_it_serves(compiled):
    model = constant(0.2, vocab_size=13)
    engine, scorer = ServingEngine(model, num_slots=2, max_length=33), PromptScorer(model)
    warm_up(engine, max_length=33)
    assert not engine.prompts.is_used
    scheduler = Scheduler(engine, lambda updates: None, max_waiting=4, score=scorer)
    scheduler.start(lower_rest(engine, scorer, max_length=33))
    scheduler._threads[1].join(120)
    compiled.clear()
    some: list[dict[str, Any]] = [
        {},
        {"sampling": SamplingConfig(temperature=1.0)},
        {"sampling": SamplingConfig(presence_penalty=1.0)},
        {"logit_bias": {3: 1.5, 7: -100.0}},
    ]
    for settings in some:
        for logprobs in (None, 0, 5, 13):
            write(engine, [3, 16], **settings, logprobs=logprobs)
            # Begins like those before; alone, and two at once.
            assert write(engine, [20], **settings, logprobs=logprobs) == [16]
            assert write(engine, [30, 29], **settings, logprobs=logprobs) == [20, 20]
            scorer([5] * 9, logprobs or 1)
    assert compiled.count(COMPILED) == 0
    assert scheduler.stop(10.0)


def test_a_server_ends_after_the_program_that_is_compiled_and_survives_one_that_fails(caplog):
    scheduler = Scheduler(ServingEngine(constant(0.3), num_slots=1, max_length=8), print, max_waiting=1)
    first, go_on, made = threading.Event(), threading.Event(), []

    class Program:
        def __init__(self, number: int):
            made.append(number)

        def compile(self) -> None:
            first.set()
            go_on.wait(60)

    scheduler.start(map(Program, range(3)))  # pyright: ignore
    assert first.wait(60)
    assert not scheduler.stop(0.01)
    go_on.set()
    assert scheduler.stop(60.0)
    assert made == [0, 1]
    failing = Scheduler(ServingEngine(constant(0.3), num_slots=1, max_length=8), print, max_waiting=1)
    failing.start(1 // 0 for _ in range(3))  # pyright: ignore
    failing._threads[1].join(60)
    assert failing.is_alive
    assert failing.stop(60.0)
    assert "compiling ahead failed (integer division or modulo by zero)" in caplog.text


@pytest.mark.parametrize("shape", [(2, 4), (1, 4)])
def test_under_a_mesh_a_warm_engine_compiles_nothing_either(compiled, shape):
    automatic = jax.sharding.AxisType.Auto
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, ("data", "memory"), axis_types=(automatic, automatic), devices=devices)
    with jax.set_mesh(mesh):
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        model = jax.device_put(constant(0.4, vocab_size=16), whole)
        engine, scorer = ServingEngine(model, num_slots=3, max_length=33), PromptScorer(model)
        warm_up(engine, max_length=33)
        compiled.clear()
        for lengths in ([3], [17, 17], [32], [31, 30]):
            write(engine, lengths)
            write(engine, lengths, sampling=SamplingConfig(temperature=1.0))
        assert compiled.count(COMPILED) == 0
        for program in lower_rest(engine, scorer, max_length=33):
            program.compile()
        compiled.clear()
        for logprobs in (None, 5, 16):
            write(engine, [3], logit_bias={3: 1.5}, logprobs=logprobs)
            write(engine, [17, 30], sampling=SamplingConfig(temperature=1.0), logprobs=logprobs or 0)
            scorer([5] * 9, logprobs or 1)
    assert compiled.count(COMPILED) == 0
