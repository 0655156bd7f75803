"""An exclusive file lock, released however its process ends."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import stat
import time
from collections.abc import Callable, Iterator

from memjax.io.console import say

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of flock on file systems without locks, such as Lustre mounted without `-o flock`."""

_MOST_FAILURES = 1000
"""How often creating the file may fail because another process has just removed its folder."""

_held: set[int] = set()


class Locked(Exception):
    """Another process, named in the message, holds the lock."""


@contextlib.contextmanager
def locked(path: pathlib.Path, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds a lock on a file while the block runs. It is released however the process ends, even by kill -9.

    The file and its folder are created if necessary. Afterwards the file is removed, with the folders created for it if
    they are empty.

    Args:
        path: the file. Links, symbolic or hard, are refused, so that no other file is ever written to.
        on_wait: called with the holder's name before waiting for a lock that is taken; None does not wait.

    Raises:
        Locked: the lock is taken, and on_wait is None.
        OSError: the file cannot be created or written.
    """
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        handle = _acquire(path, on_wait)
        try:
            _sign(handle)
            yield
        finally:
            # Before releasing the lock: a process that has opened the file meanwhile sees that it is gone and retries.
            with contextlib.suppress(OSError):
                path.unlink()
            _close(handle)
    finally:
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()


def _acquire(path: pathlib.Path, on_wait: Callable[[str], None] | None) -> int:
    failures = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(path, flags, 0o666)
        except FileNotFoundError:
            failures += 1
            if failures == _MOST_FAILURES:
                raise  # the folder exists, but no file can be created in it, as in /proc
            continue  # the last holder has just removed the folder
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, "is a link; remove it", str(path)) from None
        _held.add(handle)
        with contextlib.ExitStack() as stack:
            stack.callback(_close, handle)
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise OSError(errno.EINVAL, "is not a regular file with one name; remove it", str(path))
            _flock(handle, path, on_wait)
            if _is_at(path, handle):
                stack.pop_all()
                return handle


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _flock(handle: int, path: pathlib.Path, on_wait: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(handle)
        if on_wait is None:
            raise Locked(holder) from None
        on_wait(holder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{path.parent}: its file system has no locks, so make sure that no second process uses it")


def _is_at(path: pathlib.Path, handle: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Writes the holder's process, host and time; fails on a full disk."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
    os.fsync(handle)


def _holder(handle: int) -> str:
    for _ in range(5):
        try:
            who = json.loads(os.pread(handle, 4096, 0))
            return f"process {int(who['pid'])} on {who['host']!s:.100} since {who['since']!s:.30}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)  # the holder has not written its name yet
    return "another process"


def _close_in_child() -> None:
    """Closes inherited locks, which a forked process would keep after the death of their holder."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
