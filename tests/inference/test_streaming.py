"""Streams decode as many tokens at a time as they can without visible pauses."""

import itertools

import pytest

from memjax.inference import streaming
from memjax.inference.engine import Engine
from memjax.inference.requests import Made
from memjax.inference.streaming import Pace


class Clock(Engine):
    """An engine without a model that is its own clock: each token takes so many seconds."""

    def __init__(self, seconds: float):
        self.now, self.seconds, self.counts = 0.0, seconds, []

    def monotonic(self) -> float:
        return self.now

    def step(self, max_tokens: int) -> dict[int, Made]:
        self.now += max_tokens * self.seconds
        self.counts.append(max_tokens)
        return {}


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [(1e-4, 32, [1, 2, 4, 8, 16, 32, 32]), (1e-4, 16, [1, 2, 4, 8, 16, 16]), (2.6e-3, 32, [1, 2, 4, 8, 16, 16])],
)
def test_more_tokens_come_at_a_time_while_that_stays_fast(seconds, most, expected, monkeypatch):
    clock, pace = Clock(seconds), Pace()
    monkeypatch.setattr(streaming, "time", clock)
    for _ in expected:
        pace.step(clock, most)
    assert clock.counts == expected


def test_fewer_tokens_come_at_a_time_once_they_take_longer(monkeypatch):
    clock, pace = Clock(1e-3), Pace()
    monkeypatch.setattr(streaming, "time", clock)
    for seconds in itertools.chain([1e-3] * 6, [1e-2] * 4, [0.1] * 4):
        clock.seconds = seconds
        pace.step(clock)
    assert clock.counts == [1, 2, 4, 8, 16, 32, 32, 16, 8, 4, 4, 2, 1, 1]
