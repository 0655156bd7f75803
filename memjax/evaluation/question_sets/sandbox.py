"""Runs programs that a model wrote and their tests, in processes with limits.

memjax has its own because lm-eval's program tasks need a metric from the network whose documentation says that it is
not a sandbox.

Limited: CPU time, elapsed time, memory, file size, open files, core dumps and further processes. The program starts in
an empty folder, which is removed afterwards, without input and without this process's environment. Where the kernel
allows it (as root, or with user namespaces), it also has no network, sees only its own process and that of its tests,
cannot write to the file systems it can read, and has a few megabytes of memory for files. `missing_protection` names
what a machine does not allow.

The tests run in another process, the judge, with the same limits. It calls functions in the program's process over
pipes, parses the results as data (`program_wire`), and alone decides. So nothing that a program does to its own
process, be it with `ctypes`, raw addresses or native code, can make it pass. It passes only by its answers:

* A result that is not plain data never equals plain data, nor can it be ordered against it or combined with it. But
  tests that ask an object of the program (`result.is_valid()`, `len(result)`, `str(result)`), or that compare or
  combine two of its answers, trust it.
* Names that the tests neither define nor import are the program's, except those of libraries and of builtins other than
  the function under test.
* Without tests, the program itself reports that it ran to its last line.

Where namespaces are not allowed, a program has the user's rights to files and processes: it could change this package.
Run programs where there is nothing to lose.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from memjax.evaluation.question_sets import sandbox_launcher

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # Libraries that start a thread per core would hit the limit on processes.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_START = f"""
import sys, types
package = sys.modules["memjax"] = types.ModuleType("memjax")
package.__path__ = [{str(pathlib.Path(__file__).parents[2])!r}]
from {sandbox_launcher.__name__} import main
main()
"""
"""Imports the launcher without the package's `__init__`, and without adding to Python's path."""
_MESSAGE_BYTES = 4096
_REASON_LETTERS = 200
_GRACE_SECONDS = 10
"""Seconds beyond the time limit, for the launcher to start and to clean up."""
_DISK_BYTES, _DISK_FILES = 64 << 20, 1000
_DUMPABLE = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a program, and of its tests."""

    cpu_seconds: int = 5
    """CPU time."""
    seconds: int = 15
    """Elapsed time, waiting included."""
    memory_bytes: int = 1 << 30
    """Address space."""
    file_bytes: int = 1 << 20
    """Size of each file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """Whether it and its tests ran to their last lines."""
    reason: str
    """Why not, in one line: the error, or the limit."""


def run_program(
    program: str, tests: str = "", limits: Limits = Limits(), *, functions: Collection[str] = ()
) -> Outcome:
    """Runs a program, then its tests; both must reach their last lines. Without tests, the program itself reports it.

    The limits apply to each of the two. Tests get `functions` from the program even if builtins have the same names.
    """
    outcome, _ = _run(program, tests, limits, functions)
    return outcome


@functools.cache
def missing_protection() -> tuple[str, ...]:
    """The protections, beyond the limits, that this user and kernel do not allow."""
    _, lacks = _run("", "", Limits())
    return lacks


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
    """While the block runs, other processes of the same user can read neither this one's memory nor its environment.

    Needed where programs can see the user's processes. Meanwhile, debuggers cannot attach.
    """
    libc = ctypes.CDLL(None)
    before = libc.prctl(3, 0, 0, 0, 0)
    libc.prctl(_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_DUMPABLE, max(before, 0), 0, 0, 0)


def _run(program: str, tests: str, limits: Limits, functions: Collection[str] = ()) -> tuple[Outcome, tuple[str, ...]]:
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="memjax-program-"))
        stack.callback(_remove, folder)
        folder.chmod(0o755)
        # Separate files, so that the program's process never holds the tests.
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        for file, text in zip(files, (program, tests), strict=False):
            file.write(json.dumps(text).encode())
            file.seek(0)
        texts, errors = [file.fileno() for file in files[:2]], files[2]
        settings = {
            "folder": str(folder),
            "program": texts[0],
            "tests": texts[1],
            "functions": [*functions],
            "seconds": limits.seconds,
            "limits": _resources(limits),
            "disk_bytes": _DISK_BYTES,
            "disk_files": _DISK_FILES,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _START, json.dumps(settings)],
            cwd="/",
            env=_ENVIRONMENT | {"HOME": f"{folder}/home", "TMPDIR": f"{folder}/home"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=texts,
            start_new_session=True,
        )
        try:
            report, _ = process.communicate(timeout=limits.seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            report = b""
        finally:
            # The whole group, so that no child survives.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        try:
            found = json.loads(report)
        except ValueError:
            return Outcome(False, "the process that watches it was ended"), ()
        passed = found["verdict"] is not None and found["verdict"]["passed"]
        return Outcome(passed, "" if passed else _reason(found, errors, limits)), tuple(found["lacks"])


def _resources(limits: Limits) -> dict[str, tuple[int, int]]:
    """Names of limits in the module `resource`, with their soft and hard values."""
    most = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
    }
    # At the soft limit a signal ends the process; one that ignores it is killed a second later.
    cpu = (limits.cpu_seconds, limits.cpu_seconds + 1)
    return {"RLIMIT_CPU": cpu} | {name: (value, value) for name, value in most.items()}


def _reason(found: dict[str, Any], errors: BinaryIO, limits: Limits) -> str:
    """Why the tests do not pass or, if the program is gone, how it ended."""
    code, judges_code, verdict = found["program"], found["judge"], found["verdict"]
    if judges_code is None:
        return f"stopped after {limits.seconds} s of elapsed time"
    if verdict is None:
        return f"its tests were {_stopped(judges_code, limits)}"
    if not verdict["gone"]:
        return verdict["reason"]
    if code is None:
        return "it closed the pipes to its tests"
    if code < 0:
        return _stopped(code, limits)
    errors.seek(max(0, os.fstat(errors.fileno()).st_size - _MESSAGE_BYTES))
    lines = errors.read(_MESSAGE_BYTES).decode(errors="replace").strip().splitlines()
    if lines:
        return lines[-1][:_REASON_LETTERS]
    return "it ended before its last line" if code == 0 else f"it ended with exit code {code}"


def _stopped(code: int, limits: Limits) -> str:
    if code == -signal.SIGXCPU:
        return f"stopped after {limits.cpu_seconds} s of CPU time"
    return f"stopped by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder, however deeply a program nested its contents, which Python 3.12's own function cannot."""
    try:
        folder.rmdir()
    except OSError:
        # Folders of which it took the user's own rights.
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)
