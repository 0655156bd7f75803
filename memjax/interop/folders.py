"""Files and JSON documents in folders written by other programs; paths and contents are checked."""

import json
import math
import os
import pathlib
from typing import Any

from memjax.errors import CheckpointError
from memjax.io.documents import line_of
from memjax.io.files import read_text, write_atomic


def file_in(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of this name directly in the folder.

    Links may lead to other places in the folder, or to the blobs of the download cache to which it belongs.

    Raises:
        CheckpointError: the name is a path, or the file is missing, not a regular file, or a link to another folder.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise CheckpointError(f"{folder}: {name!r} must be the name of a file in this folder, not a path")
    path = folder / name
    # Not Path.resolve, whose error for a link to itself depends on the version of Python.
    real = pathlib.Path(os.path.realpath(path))
    inside = [pathlib.Path(os.path.realpath(folder))]
    # huggingface_hub keeps snapshots/<commit>/<name> as links to ../../blobs/<digest>.
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    if not any(real.is_relative_to(root) for root in inside):
        raise CheckpointError(
            f"{path}: is a link that leads out of its folder, to {real}; put a copy of the file there"
        )
    if not real.is_file():
        raise CheckpointError(f"{path}: is missing, or not a file; download or copy the whole model again")
    return path


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not a JSON object, or holds a number that is not finite.
    """
    try:
        content = json.loads(read_text(path), parse_constant=_refuse, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({line_of(error)}); download or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: must hold a JSON object, not {type(content).__name__}; download or copy it again"
        )
    return content


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON for people to read."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
