"""Among uncaught errors, only those of closed event loops are hidden."""

import sys
import threading

from memjax.io import closed_loops


def report(text: str) -> None:
    closed_loops._excepthook(RuntimeError, RuntimeError(text), None)


def test_of_errors_in_threads_only_closed_event_loops_are_left_out(capsys):
    for text in ("Event loop is closed", "something else"):
        thread = threading.Thread(target=report, args=[text])
        thread.start()
        thread.join()
    error = capsys.readouterr().err
    assert "something else" in error
    assert "is closed" not in error


def test_an_error_that_ends_the_program_is_shown_whatever_it_is(capsys):
    report("Event loop is closed")
    assert "Event loop is closed" in capsys.readouterr().err


def test_closed_loops_that_cannot_be_raised_are_not_shown(monkeypatch, capsys):
    class Fails:
        def __init__(self, text: str) -> None:
            self.text = text

        def __del__(self) -> None:
            raise RuntimeError(self.text)

    monkeypatch.setattr(sys, "unraisablehook", closed_loops.unraisablehook)
    for text in ("Event loop is closed", "something else"):
        fails = Fails(text)
        del fails
    error = capsys.readouterr().err
    assert "something else" in error
    assert "is closed" not in error
