"""Without a terminal, progress is an occasional line with the remaining time."""

import pytest

from memjax.monitoring import progress
from memjax.monitoring.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_after_a_while_and_show_the_remaining_time(clock, capsys):
    with Progress(1, every_seconds=10.0) as shown:
        shown.update(0.0, "begun")
        clock[0] += 10
        shown.update(0.0, "nothing")
        clock[0] += 30
        shown.update(0.2, "the first, with compiling")
        clock[0] += 5
        shown.update(0.25, "too early")
        clock[0] += 5
        shown.update(0.3, "more")
    assert capsys.readouterr().out.splitlines() == [
        "  0%  nothing  elapsed 10 s",
        " 20%  the first, with compiling  elapsed 40 s",
        " 30%  more  elapsed 50 s  left 70 s",
    ]
