"""A program is stopped at its limits, and passes only if it runs to its last line."""

import concurrent.futures
import contextlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

from memjax.evaluation.question_sets import sandbox
from memjax.evaluation.question_sets.sandbox import Limits, run_program
from memjax.evaluation.question_sets.sandbox_launcher import FILES

sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "experiments/trust"))

import cheats

LIMITS = Limits(cpu_seconds=1, seconds=20)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", ""),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def half(", "SyntaxError: '(' was never closed"),
        ("while True: pass", "stopped after 1 s of CPU time"),
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
    outcome = run_program(source, limits=LIMITS)
    assert outcome.passed == (reason == "")
    # The name of the first file that cannot be opened depends on this Python.
    assert outcome.reason == reason or (reason.endswith("'") and outcome.reason.startswith(reason))


def test_a_program_that_waits_is_stopped():
    started = time.monotonic()
    outcome = run_program("import time\ntime.sleep(60)", limits=Limits(seconds=1))
    assert outcome.reason == "stopped after 1 s of elapsed time"
    assert time.monotonic() - started < 20


def test_a_program_sees_neither_the_environment_nor_the_working_folder(monkeypatch):
    monkeypatch.setenv("SECRET_OF_A_USER", "1")
    source = """
import os, sys
assert "SECRET_OF_A_USER" not in os.environ, "environment"
assert os.getcwd() == os.environ["HOME"] == os.environ["TMPDIR"], "folder"
assert os.getcwd() not in sys.path and "" not in sys.path, "path"
assert os.listdir() == [], os.listdir()
"""
    assert run_program(source, limits=LIMITS).reason == ""


@pytest.mark.skipif(FILES in sandbox.missing_protection(), reason="needs a mount namespace")
@pytest.mark.parametrize("is_old", [False, True], ids=["in one step", "Linux before 5.12"])
def test_every_file_system_but_its_own_is_read_only(is_old, monkeypatch):
    """Those hidden below others, too, if the kernel reaches them."""
    if is_old:
        unknown = sandbox._START.replace("\nmain()", "\nmain.__globals__['_MOUNT_SETATTR'] = 9999\nmain()")
        monkeypatch.setattr(sandbox, "_START", unknown)
    source = f"""
import os
mounts = [line.split()[4:6] for line in open("/proc/self/mountinfo")]
seen = dict(mounts).items() if {is_old} else mounts
written = [place for place, options in seen if options.split(",")[0] != "ro"]
assert written == [os.path.dirname(os.getcwd())], written
"""
    assert run_program(source, limits=LIMITS).reason == ""
    assert FILES not in sandbox._run("", "", LIMITS)[1]


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_program("import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('d')", limits=LIMITS).passed
    assert list(tmp_path.iterdir()) == []


def test_programs_run_side_by_side():
    sources = [f"assert {number} % 2 == 0" for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [outcome.passed for outcome in pool.map(run_program, sources)]
    assert found == [True, False] * 3


def test_tests_run_after_the_program_and_with_its_names():
    assert run_program("def f(x): return 2 * x", "assert f(2) == 4").passed
    assert not run_program("def f(x): return 2 * x", "assert f(2) == 5").passed
    # An unterminated string in the program cannot swallow the tests.
    assert not run_program('x = """', 'assert False\n"""').passed


@pytest.mark.parametrize("how", cheats.FORGERIES)
def test_a_known_forgery_does_not_pass(how):
    assert not run_program(*cheats.split(cheats.FORGERIES[how]), LIMITS).passed


def test_a_function_under_test_may_have_the_name_of_a_builtin():
    program = "def sum(a, b): return a + b"
    assert run_program(program, "assert sum(2, 3) == 5", LIMITS, functions=["sum"]).reason == ""
    assert not run_program(program, "assert sum(2, 3) == 5", LIMITS).passed


def test_the_search_of_memory_finds_what_is_there():
    """Shows that the forgeries that search memory would find the tests, if they were in this process."""
    source = cheats.FORGERIES["searches memory by ctypes"]
    assert run_program(f"{source}\nhere = 'answer-' + str(4711)", cheats.TESTS, LIMITS).reason == ""


def test_a_program_may_use_ctypes():
    """Libraries use it."""
    source = """
import ctypes, ctypes.util, _ctypes

class Pair(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int), ("second", ctypes.c_int)]

def f(data):
    numbers = (ctypes.c_int * 2).from_buffer(data)
    assert ctypes.CDLL(None).abs(-3) == 3
    return ctypes.cast(numbers, ctypes.POINTER(Pair)).contents.second + ctypes.sizeof(Pair)
"""
    assert run_program(source, "assert f(bytearray([1, 0, 0, 0, 2, 0, 0, 0])) == 10", LIMITS).reason == ""


def test_unavailable_isolation_is_named(monkeypatch):
    monkeypatch.setattr(sandbox, "_START", cheats.without_namespaces(sandbox._START))
    _, lacks = sandbox._run("", "", LIMITS)
    assert set(lacks) >= {"a process namespace", "a network namespace", "read-only file systems"}


LEAVES = {
    "a FIFO": "import os\nos.mkfifo('errors')",
    "deep folders": "import os\nfor i in range(1500):\n  os.mkdir('deep')\n  os.chdir('deep')",
    "folders without rights": "import os\nfor i in range(9):\n  os.makedirs(f'a{i}/b/c')\n  os.chmod(f'a{i}/b', 0)",
    "many files": "for i in range(2000): open(f'{i}', 'w').close()",
    "a letter that no file can hold": "x = '\ud800'",
    "a child": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  os.fork()\n  time.sleep(61)",
    "an end of its watcher": "import os\nos.kill(os.getppid(), 9)",
}


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "none"])
def test_nothing_that_a_program_leaves_hangs_fills_or_ends_the_evaluation(tmp_path, monkeypatch, namespaces):
    if not namespaces:
        monkeypatch.setattr(sandbox, "_START", cheats.without_namespaces(sandbox._START))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: run_program(source, limits=Limits(cpu_seconds=2, seconds=4)), LEAVES.values()))
    assert time.monotonic() - started < 60
    assert list(folder.iterdir()) == []
    assert soon(lambda: str(folder) not in commands())


def test_tests_are_limited_and_see_the_files_of_the_program():
    program = "def f(x):\n  open('a', 'w').write(x)"
    assert run_program(program, "f('b')\nassert open('a').read() == 'b'", LIMITS).reason == ""
    assert run_program(program, "while True: pass", LIMITS).reason == "its tests were stopped after 1 s of CPU time"
    assert run_program(program, "x = bytes(1 << 40)", LIMITS).reason == "MemoryError"
    assert run_program(program, "import os; os._exit(0)", LIMITS).reason == "its tests were ended with exit code 0"


def test_the_environment_of_the_evaluation_cannot_be_read():
    source = f"import os\nfor p in (os.getppid(), {os.getpid()}):\n  try: open(f'/proc/{{p}}/environ').read()\n"
    source += "  except OSError: pass\n  else: raise SystemExit('read')"
    with sandbox.unreadable():
        assert run_program(source).passed


def test_programs_end_with_the_evaluation(tmp_path):
    """kill -9 of the evaluator leaves no process behind."""
    code = "from memjax.evaluation.question_sets.sandbox import run_program\nrun_program('import time; time.sleep(60)')"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        # The launcher, the namespace's first process, the program and its judge.
        assert soon(lambda: commands().count(str(tmp_path)) >= 4)
        process.kill()
    started = time.monotonic()
    assert soon(lambda: str(tmp_path) not in commands())
    assert time.monotonic() - started < Limits().seconds / 2, "the programs only ended at their time limit"


def soon(condition) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def commands() -> str:
    """The command lines of all processes."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace"))
    return "\n".join(found)
