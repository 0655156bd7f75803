"""The process that confines a program and its tests for `sandbox`; it imports little, since each program starts one.

There are four processes, each forked from another: this one enters new namespaces; the second, the first inside them,
mounts, waits and reports; its children become the program and the judge, which runs the tests. Every protection is
attempted; those that cannot be set up are reported under `lacks`.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import resource
import signal
import sys
import time
from typing import Any, NoReturn

from memjax.evaluation.question_sets.program_judge import judge, run_program
from memjax.evaluation.question_sets.program_wire import Channel

PROCESSES = "a process namespace"
NETWORK = "a network namespace"
FILES = "read-only file systems"
USER = "a user without rights"

_NOBODY, _JUDGE = 65534, 65533
"""User ids of programs and judges started by root; they differ so that neither can send the other a signal."""
_NEW_NAMESPACES = 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000
"""CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWIPC."""
_NEW_USER = 0x10000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC = 1, 2, 4, 8
_REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 32, 4096, 16384, 1 << 18
_KEPT = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}
"""Mount options that a user namespace must keep."""
_MOUNT_SETATTR, _CURRENT_FOLDER, _WHOLE_TREE = 442, -100, 0x8000
"""The system call, which has no function in older C libraries, AT_FDCWD, AT_RECURSIVE."""
_DEATH_SIGNAL, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 36, 38
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Runs the program and tests described by the first argument; reports on standard output."""
    settings = json.loads(sys.argv[1])
    lacks = _enter_namespaces()
    _guard()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    _prctl(_SUBREAPER, 1)
    folder = settings["folder"]
    if FILES not in lacks and not _mount(folder, settings["disk_bytes"], settings["disk_files"]):
        lacks.append(FILES)
    user, judges_user = _users()
    _guard()
    if user == 0:
        lacks.append(USER)
    home = os.path.join(folder, "home")
    os.makedirs(home, exist_ok=True)
    os.chmod(home, 0o1777)
    if os.geteuid() == 0:
        os.chown(home, user, user)
    # The report goes to a descriptor that neither of the two gets.
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    found = _judged(settings, user, judges_user, home, null)
    os.write(report, json.dumps({"lacks": lacks, **found}).encode())
    os._exit(0)


def _judged(settings: dict[str, Any], user: int, judges_user: int, home: str, null: int) -> dict[str, Any]:
    """Runs the program and its judge, each in a process that is confined; returns the verdict, and how both ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    (questions, asks), (answers, replies), (verdict, decides) = os.pipe(), os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        _confine(settings, user, home, [settings["program"], questions, replies])
        run_program(_text(settings["program"]), Channel(questions, replies))
    judging = os.fork()
    if judging == 0:
        os.dup2(null, 2)
        _confine(settings, judges_user, home, [settings["tests"], asks, answers, decides])
        found = judge(_text(settings["tests"]), Channel(answers, asks), settings["functions"])
        os.write(decides, json.dumps(found).encode())
        os._exit(0)
    for end in (questions, asks, answers, replies, decides):
        os.close(end)
    codes: dict[int, int] = {}
    _wait(judging, settings["seconds"], codes)
    text = os.read(verdict, 4096) if judging in codes else b""
    found = json.loads(text) if text else None
    if found is None or found["gone"]:
        # The program's exit code tells why.
        _wait(program, 1, codes)
    _end_children()
    return {"verdict": found, "program": codes.get(program), "judge": codes.get(judging)}


def _guard() -> None:
    """Makes this process die with its parent, and no other one can debug it; a new user or namespace undoes both."""
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    _prctl(_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    _libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def _enter_namespaces() -> list[str]:
    """Enters new namespaces, all or none; returns the names of the protections that are then lacking."""
    # A failure could leave some of them entered, so a child tries first.
    probe = os.fork()
    if probe == 0:
        os._exit(0 if _enter() else 1)
    if os.waitpid(probe, 0)[1] == 0 and _enter():
        return []
    return [PROCESSES, NETWORK, FILES]


def _enter() -> bool:
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        return _libc.unshare(_NEW_NAMESPACES) == 0
    if _libc.unshare(_NEW_NAMESPACES | _NEW_USER) != 0:
        return False
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    try:
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def _mount(folder: str, size: int, files: int) -> bool:
    """Makes every file system read-only except a small new one at the folder; returns whether it succeeded."""

    def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> bool:
        words = [os.fsencode(word) if word is not None else None for word in (source, target, kind)]
        return _libc.mount(*words, ctypes.c_ulong(flags), data.encode() if data is not None else None) == 0

    def make_read_only() -> bool:
        attributes = (ctypes.c_uint64 * 4)(_READ_ONLY)
        if _libc.syscall(_MOUNT_SETATTR, _CURRENT_FOLDER, b"/", _WHOLE_TREE, attributes, ctypes.c_size_t(32)) == 0:
            return True
        # Linux before 5.12: each mount that no other one hides.
        done = [mount("none", place, None, _REMOUNT | _BIND | _READ_ONLY | kept) for place, kept in _mounts()]
        return all(done)

    small = f"size={size},nr_inodes={files},mode=755"
    if not mount("none", "/", None, _RECURSIVE | _PRIVATE):
        return False
    is_read_only = make_read_only()
    if not mount("none", folder, "tmpfs", _NO_SUID | _NO_DEVICES, small):
        return False
    # Python may be installed where only its owner can read.
    for number, place in enumerate(sys.path):
        if os.path.isdir(place):
            readable = os.path.join(folder, f"python{number}")
            os.mkdir(readable)
            if mount(place, readable, None, _BIND):
                _move_imports(place, readable)
    if not mount("proc", "/proc", "proc", _READ_ONLY | _NO_SUID | _NO_DEVICES | _NO_EXEC):
        mount("none", "/proc", "tmpfs", _READ_ONLY)
    return is_read_only


def _mounts() -> list[tuple[str, int]]:
    """All mount points, with the options to keep."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        fields = [line.split()[4:6] for line in file]
    unescaped = lambda place: re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place)
    return [(unescaped(place), sum(_KEPT.get(one, 0) for one in options.split(","))) for place, options in fields]


def _move_imports(old: str, new: str) -> None:
    """Makes future imports read from another folder."""
    sys.path[:] = [new if place == old else place for place in sys.path]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if folders := getattr(module, "__path__", None):
            module.__path__ = [
                new + folder.removeprefix(old) if f"{folder}/".startswith(f"{old}/") else folder for folder in folders
            ]


def _users() -> tuple[int, int]:
    """User ids of the program and its judge: for root, two unprivileged ones if these can read Python's library."""
    if os.geteuid() != 0:
        return os.geteuid(), os.geteuid()
    library = next((place for place in sys.path if os.path.exists(os.path.join(place, "os.py"))), "")
    try:
        for user in (_NOBODY, _JUDGE):
            os.seteuid(user)
            try:
                os.listdir(library)
            finally:
                os.seteuid(0)
    except OSError:
        return 0, 0
    return _NOBODY, _JUDGE


def _wait(child: int, seconds: float, codes: dict[int, int]) -> None:
    """Waits up to `seconds` for a child; adds to `codes` the return codes of all that ended, as in subprocess."""
    deadline = time.monotonic() + seconds
    while child not in codes:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended:
            codes[ended] = os.waitstatus_to_exitcode(status)
            continue
        left = deadline - time.monotonic()
        if left <= 0 or signal.sigtimedwait([signal.SIGCHLD], left) is None:
            return


def _end_children() -> None:
    """Kills and reaps every descendant process; orphans are reparented to this one."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _text(descriptor: int) -> str:
    with open(descriptor, "rb") as file:
        return json.load(file)


def _confine(settings: dict[str, Any], user: int, home: str, descriptors: list[int]) -> None:
    """Closes all but these and the standard descriptors, sets the limits, and drops privileges."""
    for low, high in itertools.pairwise([2, *sorted(descriptors), 4096]):
        os.closerange(low + 1, high)
    for name in [name for name in sys.modules if name.partition(".")[0] == "memjax"]:
        del sys.modules[name]
    sys.argv[1:] = []
    os.chdir(home)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.setsid()
    _limit(settings["limits"])
    _drop_rights(user)


def _limit(limits: dict[str, tuple[int, int]]) -> None:
    for name, wanted in limits.items():
        number = getattr(resource, name)
        most = resource.getrlimit(number)[1]
        soft, hard = (value if most == resource.RLIM_INFINITY else min(value, most) for value in wanted)
        resource.setrlimit(number, (soft, hard))


def _drop_rights(user: int) -> None:
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _prctl(_NO_NEW_PRIVILEGES, 1)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _libc.capset(header, none)
    _guard()
