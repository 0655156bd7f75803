"""Runs programs that a model wrote, in processes with limits.

Written by hand: lm-eval's tasks for programs need a metric from the network, which says itself that it is no sandbox.

Limited: CPU time, elapsed time, memory, the size of each file, open files, core dumps, further processes. The program
starts in an empty folder that is removed, without input and without this process's environment. Where the kernel
allows it (as root, or with user namespaces), it also has no network, sees no other process, reads the file systems
without being able to write to them, and has a few megabytes of memory for files. `missing_protection` names what a
machine does not allow.

A verdict counts only with a secret that Python's own means do not reveal: frames, `gc`, tracing, and C functions by
`ctypes` (importing it is allowed, since pandas and others do). But the tests call the program's functions, so both run
in one process, and the secret must be in its memory. A program that reads raw addresses can therefore forge a verdict:
with `ctypes` pointers, NumPy's `__array_interface__` or native code. So can a result that claims to equal everything.
This scores the programs of a model; it does not withstand an adversary. Run programs where there is nothing to lose.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from memjax.evaluation.question_sets import sandbox_launcher

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # Libraries that start a thread for each core could not.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_MESSAGE_BYTES = 4096
_REASON_LETTERS = 200
_GRACE_SECONDS = 10
"""Beyond its time, for the launcher to start and to end everything."""
_DISK_BYTES, _DISK_FILES = 64 << 20, 1000
_DUMPABLE = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much a program may use."""

    cpu_seconds: int = 5
    """CPU time."""
    seconds: int = 15
    """Elapsed time, waiting included."""
    memory_bytes: int = 1 << 30
    """Address space."""
    file_bytes: int = 1 << 20
    """Each file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """Whether it and its tests ran to their last line."""
    reason: str
    """Why not, in a line: the error, or the limit."""


def run_program(program: str, tests: str = "", limits: Limits = Limits()) -> Outcome:
    """Whether a program and then its tests run without an error; one that ends itself earlier has not passed."""
    outcome, _ = _run(program, tests, limits)
    return outcome


@functools.cache
def missing_protection() -> tuple[str, ...]:
    """What this user and this kernel cannot give to programs, besides the limits."""
    _, lacks = _run("", "", Limits())
    return lacks


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
    """While the block runs, other processes of the same user can read neither this one's memory nor its environment.

    Needed where programs see the processes of their user. Debuggers cannot attach meanwhile.
    """
    libc = ctypes.CDLL(None)
    before = libc.prctl(3, 0, 0, 0, 0)
    libc.prctl(_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_DUMPABLE, max(before, 0), 0, 0, 0)


def _run(program: str, tests: str, limits: Limits) -> tuple[Outcome, tuple[str, ...]]:
    secret = secrets.token_hex(32).encode()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="memjax-program-"))
        stack.callback(_remove, folder)
        folder.chmod(0o755)
        errors = stack.enter_context(tempfile.TemporaryFile())
        pipes = [os.pipe(), os.pipe()]
        (secret_read, secret_write), (verdict_read, verdict_write) = pipes
        for end in {secret_read, verdict_read, verdict_write}:
            stack.callback(os.close, end)
        os.write(secret_write, secret)
        os.close(secret_write)
        os.set_blocking(verdict_read, False)
        settings = {
            "folder": str(folder),
            "secret": secret_read,
            "verdict": verdict_write,
            "seconds": limits.seconds,
            "limits": _resources(limits),
            "disk_bytes": _DISK_BYTES,
            "disk_files": _DISK_FILES,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", sandbox_launcher.__file__, json.dumps(settings)],
            cwd="/",
            env=_ENVIRONMENT | {"HOME": f"{folder}/home", "TMPDIR": f"{folder}/home"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[secret_read, verdict_write],
            start_new_session=True,
        )
        try:
            report, _ = process.communicate(json.dumps([program, tests]).encode(), limits.seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            report = b""
        finally:
            # The whole group, so that no child stays behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        try:
            found = json.loads(report)
        except ValueError:
            return Outcome(False, "the process that watches it was ended"), ()
        passed = found["code"] == 0 and _read(verdict_read) == secret
        return Outcome(passed, "" if passed else _reason(found["code"], errors, limits)), tuple(found["lacks"])


def _resources(limits: Limits) -> dict[str, tuple[int, int]]:
    """Names of limits in the module `resource`, with their soft and hard values."""
    most = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
    }
    # A second for the signal that says why; whoever ignores it is killed.
    cpu = (limits.cpu_seconds, limits.cpu_seconds + 1)
    return {"RLIMIT_CPU": cpu} | {name: (value, value) for name, value in most.items()}


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 4096)
    except BlockingIOError:
        return b""


def _reason(code: int | None, errors: BinaryIO, limits: Limits) -> str:
    if code is None:
        return f"stopped after {limits.seconds} s by the clock"
    if code == -signal.SIGXCPU:
        return f"stopped after {limits.cpu_seconds} s of computing"
    if code < 0:
        return f"stopped by {signal.Signals(-code).name}"
    errors.seek(max(0, os.fstat(errors.fileno()).st_size - _MESSAGE_BYTES))
    lines = errors.read(_MESSAGE_BYTES).decode(errors="replace").strip().splitlines()
    if lines:
        return lines[-1][:_REASON_LETTERS]
    return "it ended before its last line" if code == 0 else f"it ended with exit code {code}"


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder, however deep what a program has left in it: what is below is moved up first."""
    count = 0
    with contextlib.suppress(OSError):
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                    os.unlink(entry.path)
                    continue
                for inner in list(os.scandir(entry.path)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner.path, 0o700)  # to move a folder, one must be able to write into it
                    os.rename(inner.path, folder / f".{count}")
                    count += 1
                os.rmdir(entry.path)
        folder.rmdir()
