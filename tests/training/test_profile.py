"""Which steps of a run are traced, and what is reported about them."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.log import ProfileConfig
from memjax.monitoring.profile import newest_trace
from memjax.training import profile
from memjax.training.in_flight import Step
from memjax.training.profile import Profile


def run(hook: Profile, steps: range, work: Callable[[], object] = lambda: None) -> list[int]:
    """Runs the steps as the training loop does; returns those at which it paused."""
    pauses: list[int] = []
    now = 0

    @contextlib.contextmanager
    def paused():
        pauses.append(now)
        yield

    trainer: Any = SimpleNamespace(paused=paused)
    for now in steps:
        hook.before_step(trainer, now)
        with jax.profiler.StepTraceAnnotation("train", step_num=now):
            work()
        hook.after_step(trainer, Step(now, {}, is_last=now == steps[-1]))
    hook.end(trainer)
    return pauses


@pytest.fixture
def fake_profiler(monkeypatch):
    """Replaces the profiler; records when traces start and stop."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("config", "steps", "traced"),
    [
        (ProfileConfig(start=3, steps=2), range(1, 9), [3, 4]),
        (ProfileConfig(start=1, steps=1), range(1, 3), [1, 1]),
        (ProfileConfig(start=3, steps=9), range(1, 6), [3, 5]),
        (ProfileConfig(start=3, steps=4), range(5, 9), [5, 6]),
        (ProfileConfig(start=3, steps=2), range(5, 9), []),
    ],
)
def test_the_steps_of_the_config_are_traced_and_the_run_pauses_at_both_ends(
    fake_profiler, tmp_path, config, steps, traced
):
    assert run(Profile(config, tmp_path), steps) == traced
    assert fake_profiler == ["start", "stop"][: len(traced)]


def test_other_processes_pause_at_the_same_steps_without_a_trace(fake_profiler, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "is_first", lambda: False)
    assert run(Profile(ProfileConfig(start=2, steps=2), tmp_path), range(1, 9)) == [2, 3]
    assert fake_profiler == []


def test_a_run_that_ends_early_ends_its_trace(fake_profiler, tmp_path):
    hook = Profile(ProfileConfig(start=1, steps=5), tmp_path)
    trainer: Any = SimpleNamespace(paused=contextlib.nullcontext)
    hook.before_step(trainer, 1)
    hook.end(trainer)
    hook.end(trainer)
    assert fake_profiler == ["start", "stop"]


def test_a_failing_profiler_is_reported_and_the_run_continues(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise RuntimeError("another trace is under way")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    assert run(Profile(ProfileConfig(start=2, steps=2), tmp_path), range(1, 9)) == [2, 3]
    assert capsys.readouterr().err == (
        "log.profile: RuntimeError: another trace is under way. The run continues without it.\n"
    )


def test_a_trace_without_a_file_is_reported(fake_profiler, tmp_path, capsys):
    run(Profile(ProfileConfig(start=2, steps=2), tmp_path), range(1, 9))
    assert "the profiler wrote no trace" in capsys.readouterr().err


def test_the_operations_of_traced_steps_are_reported_on_this_machine(tmp_path, capsys):
    @jax.jit
    def work(x):
        return jnp.sort(jnp.tanh(x @ x), axis=0)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 200)), jnp.float32)
    work(x).block_until_ready()
    hook = Profile(ProfileConfig(start=2, steps=3, top=20), tmp_path)
    run(hook, range(1, 7), lambda: work(x).block_until_ready())
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == "profile of the steps 2 to 4"
    uses = {line.split()[-1]: int(line.split()[2]) for line in lines[2:-1]}
    assert uses["sort"] == 3
    assert "100.0%" in lines[-2]
    assert str(newest_trace(tmp_path)) in lines[-1]
