"""Paths that people write."""

import pathlib
import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def local_path(text: str, name: str) -> pathlib.Path:
    """The path of a file or folder of this machine: `~` is expanded, addresses of remote stores are refused.

    Args:
        text: what was written.
        name: the setting or argument that holds it, for the message.

    Raises:
        ValueError: the text is empty, holds a NUL, or is an address such as gs://bucket/run.
    """
    if not text or "\0" in text:
        raise ValueError(f"{name}={text!r} must be the path of a file or folder")
    if _SCHEME.match(text):
        raise ValueError(
            f"{name}={text} must be a path on this machine: remote storage is not supported; mount the store, or copy "
            "the files here"
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{name}={text}: the home folder of that user is not known; write the whole path") from None
