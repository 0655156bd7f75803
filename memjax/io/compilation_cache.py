"""JAX's persistent compilation cache in the user's cache folder, so that a second start compiles nothing.

JAX reads and writes the entries, except Triton kernels (`memjax.ops.kernel_cache`). This module separates entries by
what JAX's keys lack (the jaxlib version and the CPU's instruction set), removes damaged ones, and limits the total
size. JAX's own limit (`jax_compilation_cache_max_size`) needs the package filelock, and locks and lists the folder at
every read.
"""

import atexit
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import time
import warnings
import zlib

from memjax.io.console import warn
from memjax.io.files import read_object, write_atomic
from memjax.io.paths import local_path, user_cache

_VARIABLE = "MEMJAX_COMPILE_CACHE"
"""Environment variable: a folder, or `off`."""

MAX_BYTES = 2 << 30
"""Maximum size of a folder; the least recently used entries are removed first."""

DAYS = 60
"""Folders of other jaxlib versions or machines are removed after this many days without a new entry."""

_CHECKED = "checked.json"
KERNEL_SUFFIX = "-kernel"
"""Suffix of entries that are Triton kernels, not JAX programs."""
_SUFFIXES = ("-cache", KERNEL_SUFFIX)


def enable(setting: str | None = "auto") -> pathlib.Path | None:
    """Enables the cache; must be called before anything is compiled. An unusable folder causes only a warning.

    Args:
        setting: `auto`: a folder of memjax in the user's cache folder; None: no cache; otherwise a folder. The variable
            MEMJAX_COMPILE_CACHE overrides `auto`; if JAX's own variables are set, nothing is changed.

    Returns:
        The folder, or None if the cache is off.
    """
    chosen = os.environ.get(_VARIABLE) if setting == "auto" else setting
    if chosen is None and setting == "auto":
        chosen = user_cache("compiled")
    of_jax = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    if not chosen or chosen.lower() in ("off", "null", "none") or any(map(os.environ.get, of_jax)):
        return None
    import jax

    try:
        folder = local_path(chosen, _VARIABLE) / _machine()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "not writable")
        # An entry is machine code: a folder that another user can write must not be trusted.
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            raise PermissionError(1, "belongs to another user")
        _tidy(folder)
        _remove_old(folder)
    except (OSError, ValueError) as error:
        if setting != "auto" or _VARIABLE in os.environ:
            reason = getattr(error, "strerror", None) or error
            warn(f"compiled programs are not kept: {chosen}: {reason}")
        return None
    # JAX compiles entries that it cannot read and skips those that it cannot write; neither concerns the user.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Hundreds of small programs take as long as the few large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    atexit.register(_tidy_at_exit, folder)
    return folder


def _machine() -> str:
    """A folder name for jaxlib and the CPU model: machines that share a home folder may differ in instruction sets."""
    kind = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        # The first line of each: cores are identical, and frequencies change.
        names = ("model name", "flags", "Features", "CPU part")
        kind += [next((line for line in lines if line.startswith(name)), "") for name in names]
    digest = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:12]
    return f"jaxlib-{importlib.metadata.version('jaxlib')}-{digest}"


def _tidy_at_exit(folder: pathlib.Path) -> None:
    """Tidies once more, to record the checksums of entries that this process has written."""
    with contextlib.suppress(Exception):
        _tidy(folder)


def _tidy(folder: pathlib.Path) -> None:
    """Removes damaged entries, and the least recently used ones if the folder is too large.

    A process killed while writing leaves a partial entry, which JAX would neither use nor replace. Each entry is read
    and decompressed once; its size, time and checksum are stored, and it is read again when size or time change.
    """
    known = read_object(folder / _CHECKED) or {}
    checked: dict[str, list[int]] = {}
    sizes: list[tuple[float, int, pathlib.Path]] = []
    for path in (path for suffix in _SUFFIXES for path in folder.glob(f"*{suffix}")):
        with contextlib.suppress(OSError):  # another process removes entries too
            stat = path.stat()
            state, old = [stat.st_size, stat.st_mtime_ns], known.get(path.name)
            if not (isinstance(old, list) and len(old) == 3):
                old = None
            if old is None or old[:2] != state:
                content = path.read_bytes()
                checksum = zlib.crc32(content)
                if not _is_entry(content) if old is None else checksum != old[2]:
                    # Another process may still be writing a partial entry.
                    if old is not None or time.time() - stat.st_mtime > 60:
                        path.unlink()
                    continue
                old = [*state, checksum]
            checked[path.name] = old
            sizes.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in sizes)
    for _, size, path in sorted(sizes, key=lambda entry: entry[0]):
        if total <= MAX_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        checked.pop(path.name, None)
        total -= size
    if checked != known:
        write_atomic(folder / _CHECKED, json.dumps(checked))


def _remove_old(folder: pathlib.Path) -> None:
    """Removes folders of other versions and machines without new entries for `DAYS` days."""
    for other in folder.parent.glob("jaxlib-*"):
        with contextlib.suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime > DAYS * 24 * 3600:
                shutil.rmtree(other, ignore_errors=True)


def _is_entry(content: bytes) -> bool:
    """Whether an entry is complete: it decompresses with zlib or zstd."""
    try:
        if content[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard  # pyright: ignore[reportMissingImports]  # JAX uses it if installed

            zstandard.ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except Exception:
        return False
    return True
