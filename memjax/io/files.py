"""Atomic replacement of files."""

import contextlib
import os
import pathlib
import tempfile


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> pathlib.Path:
    """Replaces a file by new content: readers, a kill and a full disk see the old file or the new one, never a part.

    The temporary file is new and has a name of its own in the same folder, so neither a link laid there nor a second
    process can redirect the write. Text is encoded as UTF-8. A file that holds the content already is left alone.

    Args:
        path: the file; its folder is created.
        content: all of the new content.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
    """
    path = pathlib.Path(path)
    data = content.encode() if isinstance(content, str) else content
    with contextlib.suppress(OSError):
        if not path.is_symlink() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            # mkstemp makes private files; these get the mode that open() would have given them.
            os.fchmod(handle, default_mode())
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def default_mode() -> int:
    """The permissions that `open` gives a new file under this process's umask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask
