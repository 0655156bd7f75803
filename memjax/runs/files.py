"""Files and folders owned by one process, and folders created atomically."""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

from memjax.errors import CheckpointError, ConfigError
from memjax.io.lock import Locked, locked
from memjax.io.paths import local_path

_SETTLED_SECONDS = 0.2
"""Time between attempts to remove a folder, which Orbax's threads may recreate briefly after a failed save."""


def check_new(folder: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a folder that is not empty, or that a new folder cannot replace."""
    path = _target(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} already exists and is not empty; name a new folder")
    is_mount = path.absolute().is_mount()
    if is_mount or (path.exists() and path.samefile(os.curdir)):
        kind = "a mount point" if is_mount else "the current folder"
        raise ConfigError(f"{path} is {kind}, which no new folder can replace; name a folder in it")


@contextlib.contextmanager
def owned(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from writing a file or folder of this name while the block runs.

    Raises:
        ConfigError: another process is writing it.
        OSError: the folder it is in cannot be written.
    """
    try:
        with locked(path.with_name(f".{path.name}.lock")):
            yield
    except Locked as error:
        raise ConfigError(f"{path} is being written by {error}; name another") from None


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder, which is renamed atomically when the block ends; an error leaves nothing behind.

    Leftovers of a killed process are removed first.

    Raises:
        ConfigError: the folder is not empty, or another process is writing it.
        CheckpointError: it cannot be written.
    """
    target = _target(folder).absolute()
    # Beside the target, because a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.unfinished")
    try:
        with owned(target):
            check_new(folder)
            _remove(temporary)
            try:
                temporary.mkdir()
                yield temporary
                os.replace(temporary, target)
            finally:
                _remove(temporary)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error}); is the disk full, and may its parent be written?"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(temporary), str(target))) from error


def _remove(folder: pathlib.Path) -> None:
    for _ in range(25):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_SETTLED_SECONDS)


def _target(folder: str | os.PathLike[str]) -> pathlib.Path:
    path = local_path(folder, "out", ConfigError)
    return pathlib.Path(os.path.realpath(path)) if path.is_symlink() else path
