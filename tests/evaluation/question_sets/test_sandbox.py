"""A program is stopped at its limits, and counts as right only if it runs to its last line."""

import concurrent.futures
import contextlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

from memjax.evaluation.question_sets import sandbox, sandbox_launcher
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
    outcome = run_program(source, limits=LIMITS)
    assert outcome.passed == (reason == "")
    # The number of the file that is one too many is that of this Python.
    assert outcome.reason == reason or (reason.endswith("'") and outcome.reason.startswith(reason))


def test_a_program_that_waits_is_stopped():
    started = time.monotonic()
    outcome = run_program("import time\ntime.sleep(60)", limits=Limits(seconds=1))
    assert outcome.reason == "stopped after 1 s by the clock"
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
    # What the program leaves open cannot swallow the tests.
    assert not run_program('x = """', 'assert False\n"""').passed


FORGERIES = {
    "exit": "import os\nos._exit(0)",
    "writes to every descriptor": "import os\nfor i in range(3, 64):\n  try: os.write(i, b'0' * 64)\n"
    "  except OSError: pass\nos._exit(0)",
    "reads what is left of the secret": "import os\nos.set_blocking(0, False)\nfor i in range(3, 64):\n"
    "  try:\n    os.set_blocking(i, False)\n    found = os.read(i, 64)\n    for j in range(3, 64):\n"
    "      try: os.write(j, found)\n      except OSError: pass\n  except OSError: pass\nos._exit(0)",
    "skips lines": "import sys\nsys.settrace(lambda *a: None)",
    "searches objects": "import gc\ngc.get_objects()",
    "searches memory": "import ctypes\nctypes.string_at(id(1), 8)",
    "changes the guard by its frame": "import gc\ntry: gc.get_objects()\nexcept PermissionError as e:\n"
    "  f = e.__traceback__.tb_next.tb_frame\n  f.f_locals['forbidden'] = ()\n  f.f_globals['_FORBIDDEN'] = ()\n"
    "try: gc.get_objects()\nexcept PermissionError: pass\nelse: raise SystemExit('secret')",
    "finds what imported it": "import sys\nf = sys._getframe()\nwhile f:\n"
    "  assert not {'ctypes', '_libc'} & f.f_globals.keys(), 'secret'\n  f = f.f_back\nsys.exit(0)",
    "looks into frames": "import sys\nf = sys._getframe()\nwhile f:\n"
    "  for v in [*f.f_locals.values(), *f.f_globals.values()]:\n"
    "    assert not (isinstance(v, bytes) and len(v) == 64), 'secret'\n  f = f.f_back\nsys.exit(0)",
    "changes what runs afterwards": "import os, builtins, sys\nbuiltins.exec = builtins.compile = os.write = print\n"
    "sys._getframe(1).f_globals.clear()",
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_known_forgery_does_not_pass(how):
    outcome = run_program(FORGERIES[how], "assert False", LIMITS)
    assert not outcome.passed
    assert "secret" not in outcome.reason


def test_a_program_may_import_ctypes():
    """Libraries do: pandas with its first import."""
    source = """
import ctypes, ctypes.util, _ctypes

class Pair(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int), ("second", ctypes.c_int)]

def f(data):
    numbers = (ctypes.c_int * 2).from_buffer(data)
    return ctypes.cast(numbers, ctypes.POINTER(Pair)).contents.second + ctypes.sizeof(Pair)
"""
    assert run_program(source, "assert f(bytearray([1, 0, 0, 0, 2, 0, 0, 0])) == 10", LIMITS).reason == ""


REFUSED = {
    "import ctypes, os\nctypes.CDLL(None).process_vm_readv(os.getpid(), 0, 0, 0, 0, 0)": "ctypes.dlsym",
    # A copy of the module under another name raises the same events.
    "import _ctypes, importlib.util as u\ns = u.spec_from_file_location('a._ctypes', _ctypes.__file__)\n"
    "m = u.module_from_spec(s)\ns.loader.exec_module(m)\nm.dlsym(m.dlopen(None, 2), 'getpid')": "ctypes.dlsym/handle",
    "import ctypes\nctypes.string_at(id(1), 8)": "ctypes.string_at",
    "import gc\ngc.get_objects()": "gc.get_objects",
    "import sys\nsys.settrace(lambda *a: None)": "sys.settrace",
}


@pytest.mark.parametrize("source", REFUSED)
def test_a_refused_call_is_an_error_that_names_it(source):
    outcome = run_program(source, limits=LIMITS)
    assert outcome.reason == f"PermissionError: a program may not use {REFUSED[source]}"


def without_namespaces(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user has whom the kernel allows nothing."""
    source = pathlib.Path(sandbox_launcher.__file__).read_text(encoding="utf-8")
    launcher = tmp_path / "launcher.py"
    launcher.write_text(source.replace("_libc.unshare(", "abs(-1) or ("), encoding="utf-8")
    monkeypatch.setattr(sandbox_launcher, "__file__", str(launcher))


def test_what_cannot_be_had_is_named(tmp_path, monkeypatch):
    without_namespaces(tmp_path, monkeypatch)
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
        without_namespaces(tmp_path, monkeypatch)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: run_program(source, limits=Limits(cpu_seconds=2, seconds=4)), LEAVES.values()))
    assert time.monotonic() - started < 60
    assert list(folder.iterdir()) == []
    assert soon(lambda: str(folder) not in commands())


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
        # The launcher, the first process of its namespace, and the program.
        assert soon(lambda: commands().count(str(tmp_path)) >= 3)
        process.kill()
    started = time.monotonic()
    assert soon(lambda: str(tmp_path) not in commands())
    assert time.monotonic() - started < Limits().seconds / 2, "they ended at their limit"


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
