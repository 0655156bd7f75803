"""A program is stopped at its limits, and counts as right only if it runs to its last line."""

import concurrent.futures
import os
import time

import pytest

from memjax.evaluation.question_sets.sandbox import Limits, run_program

LIMITS = Limits(cpu_seconds=1, seconds=20)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", ""),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def half(", "SyntaxError: '(' was never closed"),
        ("while True: pass", "stopped after 1 s of computing"),
        ("x = bytes(1 << 40)", "MemoryError"),
        ("open('large', 'wb').write(bytes(1 << 24))", "OSError: [Errno 27] File too large"),
        ("files = [open(f'{i}', 'w') for i in range(99)]", "OSError: [Errno 24] Too many open files: '"),
        ("import sys\nsys.exit(0)", "it ended before its last line"),
        ("import os\nos._exit(0)", "it ended before its last line"),
        ("import os\nos._exit(3)", "it ended with exit code 3"),
        ("import os\nos.kill(os.getpid(), 9)", "stopped by SIGKILL"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import os\nos.chdir('/')", ""),
        ("import sys\nsys.stderr.write('x' * 500)\nsys.exit(1)", "x" * 200),
    ],
)
def test_how_a_program_ends(source, reason):
    outcome = run_program(source, LIMITS)
    assert outcome.passed == (reason == "")
    # The number of the file that is one too many is that of this Python.
    assert outcome.reason == reason or (reason.endswith("'") and outcome.reason.startswith(reason))


def test_a_program_that_waits_is_stopped_with_its_children():
    source = "import os, time\nos.fork()\ntime.sleep(60)"
    started = time.monotonic()
    outcome = run_program(source, Limits(seconds=1))
    assert time.monotonic() - started < 20
    if os.geteuid() == 0:  # whom the number of processes does not bind
        assert outcome.reason == "stopped after 1 s by the clock"
    else:
        assert outcome.reason == "BlockingIOError: [Errno 11] Resource temporarily unavailable"


def test_a_program_sees_neither_the_environment_nor_the_working_folder(monkeypatch):
    monkeypatch.setenv("SECRET_OF_A_USER", "1")
    source = """
import os, sys
assert "SECRET_OF_A_USER" not in os.environ, "environment"
assert os.getcwd() == os.environ["HOME"] == os.environ["TMPDIR"], "folder"
assert os.getcwd() not in sys.path and "" not in sys.path, "path"
assert set(os.listdir()) == {"program.py", "errors"}, os.listdir()
"""
    assert run_program(source, LIMITS).reason == ""


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_program("import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('d')", LIMITS).passed
    assert list(tmp_path.iterdir()) == []


def test_programs_run_side_by_side():
    sources = [f"assert {number} % 2 == 0" for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [outcome.passed for outcome in pool.map(run_program, sources)]
    assert found == [True, False] * 3
