"""Paths and addresses given by users."""

import contextlib
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def local_path(
    path: str | os.PathLike[str], name: str, raises: Callable[[str], Exception] = ValueError
) -> pathlib.Path:
    """A local path with `~` expanded; addresses of remote stores are rejected.

    Raises:
        ValueError, or what `raises` names: the path is not text, is empty, holds a NUL, or is an address such as
            gs://bucket/run.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise raises(f"{name}={path!r} must be the path of a file or folder, as a text or a pathlib.Path")
    if _SCHEME.match(text):
        raise raises(f"{name}={text} must be a path on this machine; mount the store, or copy the files here")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise raises(f"{name}={text}: the home folder of that user is not known; write the whole path") from None


@contextlib.contextmanager
def literal(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path to the folder that Orbax and TensorStore take literally: a link, if its own path contains `[` or a
    backslash.

    Orbax finds files with a glob that contains the path, and both treat a backslash as a slash. Without the link Orbax
    would silently save unreadable checkpoints.
    """
    whole = os.path.abspath(folder)
    if "[" not in whole and "\\" not in whole:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="memjax-") as temporary:
        link = pathlib.Path(temporary) / "folder"
        link.symlink_to(whole, target_is_directory=True)
        yield link


_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "gs": "gcsfs",
    "s3": "s3fs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""Package needed to read each scheme, besides fsspec; `memory` is in-process, for tests."""


def is_remote(text: str | os.PathLike[str]) -> bool:
    """Whether it is an address with a known scheme, such as gs://bucket/run, rather than a path."""
    return str(text).partition("://")[0] in _PACKAGES and "://" in str(text)


def hub_download(path: str | os.PathLike[str]) -> str | None:
    """The command that downloads ORG/NAME from the Hugging Face Hub; None if the path is not such a name."""
    name = os.fspath(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or os.path.isdir(os.path.dirname(name)):
        return None
    return f"hf download {name} --local-dir {os.path.basename(name)}"


def path_or_address(text: str, name: str) -> str:
    """A path as returned by `local_path`, or an address with a known scheme, even if it cannot be read here.

    Raises:
        ValueError: it is neither.
    """
    return text if is_remote(text) else str(local_path(text, name))


def readable_path(text: str, name: str) -> str:
    """A path as returned by `local_path`, or an address that fsspec can read here.

    Raises:
        ValueError: it is neither, or the package needed to read the address is missing.
    """
    if package := missing_package(text):
        raise ValueError(
            f"{name}={text} needs the package {package} to read {text.partition('://')[0]}:// (pip install "
            "'memjax[remote]'); or mount the store, or copy the files here"
        )
    return path_or_address(text, name)


def missing_package(text: str) -> str | None:
    """The missing package that is needed to read an address; None for paths, or if all are installed."""
    if not is_remote(text):
        return None
    needed = ("fsspec", _PACKAGES[text.partition("://")[0]])
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


def user_cache(name: str) -> str:
    """A folder of memjax in the user's cache folder; may contain an unexpanded `~`."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # the specification says to ignore relative paths
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "memjax", name)
