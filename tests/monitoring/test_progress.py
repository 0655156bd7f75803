"""Without a terminal, progress is a line now and then, with the time that is left."""

import pytest

from memjax.monitoring import progress
from memjax.monitoring.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_after_a_while_and_tell_what_is_left(clock, capsys):
    with Progress(1, every_seconds=10.0) as shown:
        shown.update(0.0, "begun")
        clock[0] += 10
        shown.update(0.0, "nothing")
        clock[0] += 9
        shown.update(0.2, "too early")
        clock[0] += 1
        shown.update(0.25, "a quarter")
    assert capsys.readouterr().out.splitlines() == [
        "  0%  nothing  elapsed 10 s",
        " 25%  a quarter  elapsed 20 s  left 60 s",
    ]
