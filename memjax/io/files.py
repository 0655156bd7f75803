"""Atomic file replacement, and safe reading from untrusted folders."""

import contextlib
import errno
import io
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

MAX_BYTES = 1 << 28
"""Maximum size of a document; a tokenizer of 256,000 tokens has about 40 MB."""


@contextlib.contextmanager
def open_document(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading.

    In an untrusted folder, a name may be an endless pipe or a device. Only pipes of a shell, such as /dev/fd/63 or
    /proc/self/fd/63, are read.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    path = os.fspath(path)
    is_shell_pipe = path.startswith(("/dev/fd/", "/proc/self/fd/")) or path == "/dev/stdin"
    # Opening a pipe would wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if is_shell_pipe else os.O_NONBLOCK))
    # Given a path instead of a descriptor, `open` names the file in its errors.
    with open(path, "rb", opener=lambda *_: handle) as file:
        if not is_shell_pipe:
            check_regular(os.fstat(handle), path)
        yield file


def read_document(path: str | os.PathLike[str], most_bytes: int | None = MAX_BYTES) -> bytes:
    """The content of a regular file, opened like `open_document`.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than most_bytes.
    """
    with open_document(path) as file:
        if most_bytes is None:
            return file.read()
        size = os.fstat(file.fileno()).st_size
        content = file.read(most_bytes + 1) if size <= most_bytes else b""
    if size > most_bytes or len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes:,} bytes", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], most_bytes: int | None = MAX_BYTES) -> str:
    """The text of a regular file, like `read_document`; raises UnicodeDecodeError if it is not UTF-8."""
    return read_document(path, most_bytes).decode("utf-8")


def check_inside(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> None:
    """Raises an OSError if a link leads the path out of its folder."""
    real, inside = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, inside]) != inside:
        message = f"leads out of its folder, to {real}, where nothing is written; move that folder here"
        raise OSError(errno.EINVAL, message, os.fspath(path))


def check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raises an OSError for a folder, a pipe, a device or a socket."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> pathlib.Path:
    """Replaces a file's content atomically: even after a kill or on a full disk, the file is the old or the new one.

    The temporary file is newly created with a unique name in the same folder, so neither a planted link nor a second
    process can redirect the write. Text is encoded as UTF-8. A file that already has the content is left alone; a
    missing folder is created.

    Raises:
        OSError: the file cannot be written, or is a device or a pipe; the old file is unchanged.
    """
    path = pathlib.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if path.exists():
        check_regular(path.stat(), path)  # root could replace /dev/null with a file
    with contextlib.suppress(OSError):
        if not path.is_symlink() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            # mkstemp creates private files; give this one the mode that open() would.
            os.fchmod(handle, default_mode())
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds a file's name to errors that lack it, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def written_lines(path: str | os.PathLike[str]) -> Iterator[Callable[[str], None]]:
    """Yields a function that writes and flushes a line to a new file; errors in writing name the file."""
    with open(path, "w", encoding="utf-8") as file:

        def write(line: str) -> None:
            with naming(path):
                print(line, file=file, flush=True)

        try:
            yield write
        finally:
            with naming(path):  # closing retries failed writes
                file.close()


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is missing or damaged."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def default_mode() -> int:
    """The permissions that `open` gives a new file under this process's umask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask
