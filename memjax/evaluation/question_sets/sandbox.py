"""Runs a Python program that nobody has read, in a process with limits.

What is limited: CPU time, time by the clock, memory, the size of each file, open files, core dumps and, unless this
process is root's, further processes. The program starts in an empty folder that is removed, and gets neither input nor
this process's environment. What is not: it may use the network, and read, write and remove whatever the user may who
started this. Programs by a model are therefore for a container or a machine that has nothing to lose.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile

_LAUNCHER = """
import json, os, resource, sys
for name, wanted in json.loads(sys.argv[1]).items():
    most = resource.getrlimit(getattr(resource, name))[1]
    limits = [value if most == resource.RLIM_INFINITY else min(value, most) for value in wanted]
    resource.setrlimit(getattr(resource, name), limits)
os.execv(sys.executable, [sys.executable, "-I", "-B", sys.argv[2]])
"""
"""Limits itself and becomes the program. In a process of its own, because code between fork and exec of a process with
threads, as JAX's are, can wait for ever."""

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # Libraries that start a thread for each core could not.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_MESSAGE_BYTES = 4096
_REASON_LETTERS = 200


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much a program may use."""

    cpu_seconds: int = 5
    """Time of computing."""
    seconds: int = 15
    """Time by the clock, waiting included."""
    memory_bytes: int = 1 << 30
    """Address space."""
    file_bytes: int = 1 << 20
    """Each file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """Whether it ran to its last line."""
    reason: str
    """Why not, in a line: the error, or the limit."""


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Whether a program runs to its end without an error; one that ends itself earlier, even with exit(0), has not."""
    # Its last line leaves a mark whose name no program knows before it is written.
    mark = f"passed-{secrets.token_hex(16)}"
    with tempfile.TemporaryDirectory(prefix="memjax-program-", ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        last = f"open({str(folder / mark)!r}, 'w').close()"
        (folder / "program.py").write_text(f"{source}\n\n{last}\n", encoding="utf-8")
        with (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _LAUNCHER, json.dumps(_resources(limits)), "program.py"],
                cwd=folder,
                env=_ENVIRONMENT | {"HOME": name, "TMPDIR": name},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        try:
            process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"stopped after {limits.seconds} s by the clock")
        finally:
            # The whole group, so that no child stays behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if (folder / mark).exists() and process.returncode == 0:
            return Outcome(True, "")
        return Outcome(False, _reason(process.returncode, folder / "errors", limits))


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


def _reason(code: int, errors: pathlib.Path, limits: Limits) -> str:
    if code == -signal.SIGXCPU:
        return f"stopped after {limits.cpu_seconds} s of computing"
    if code < 0:
        return f"stopped by {signal.Signals(-code).name}"
    with contextlib.suppress(OSError), errors.open("rb") as file:
        file.seek(max(0, errors.stat().st_size - _MESSAGE_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1][:_REASON_LETTERS]
    return "it ended before its last line" if code == 0 else f"it ended with exit code {code}"
