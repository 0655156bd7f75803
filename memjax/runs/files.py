"""Folders that are created atomically."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from memjax.errors import CheckpointError, ConfigError
from memjax.io.paths import local_path


def check_new(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that holds something.

    Raises:
        ConfigError: it does.
    """
    path = _target(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is there already and not empty; name a new folder")


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary folder that gets the given name when the block ends, atomically; after an error nothing is left.

    Raises:
        ConfigError: the folder holds something.
        CheckpointError: it cannot be written.
    """
    check_new(folder)
    target = _target(folder).absolute()
    # Beside the target, because only within a file system a folder moves in one step.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error}); is the disk full, and may its parent be written?"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _target(folder: str | os.PathLike[str]) -> pathlib.Path:
    try:
        return local_path(os.fspath(folder), "out")
    except ValueError as error:
        raise ConfigError(str(error)) from None
