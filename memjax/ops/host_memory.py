"""Tables in host memory, allocated outside JAX and read without a copy: by kernels over the bus, or by XLA on a CPU.

XLA's own host memory spaces are of no use here: XLA computes on them with slow host code, or moves the data first.
Instead, rows lie in memory registered once with the driver (`cuMemHostRegister`); programs take its address as data.
"""

import contextlib
import ctypes
import functools
import mmap
import pathlib
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt8

from memjax.errors import ConfigError

_PORTABLE_AND_MAPPED = 3
"""Flags of cuMemHostRegister: pinned for all contexts of the process, and mapped into the devices' address space."""


def allocate(num_bytes: int) -> UInt8[np.ndarray, " b"]:
    """Page-aligned zeros, which live as long as the array and its views.

    Raises:
        ConfigError: less memory than that is available.
    """
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise ConfigError(
            f"table_place=host needs {num_bytes / 1e9:.1f} GB of host memory, of which {available / 1e9:.1f} GB are "
            "available; use a smaller table_format (int8, int4), or a machine with more memory"
        )
    return np.frombuffer(mmap.mmap(-1, max(1, num_bytes)), np.uint8)[:num_bytes]


def map_file(path: pathlib.Path, num_bytes: int) -> UInt8[np.ndarray, " b"]:
    """A file's bytes, read from disk on demand; writes to the array do not reach the file."""
    return np.memmap(path, np.uint8, "c", shape=(num_bytes,)) if num_bytes else np.zeros(0, np.uint8)


def available_bytes() -> int | None:
    """Bytes of host memory that the process can still allocate, within its container's limit; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = pathlib.Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # The page cache counts as used, but is reclaimed on demand.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(stat.get("inactive_file", 0)))
    return min(found, default=None)


def as_array(rows: np.ndarray) -> Array:
    """Host memory as an array on a CPU device, without a copy. Types that NumPy lacks are returned as their bits."""
    plain = rows if rows.dtype.kind in "iuf" and rows.dtype.isbuiltin == 1 else rows.view(f"u{rows.dtype.itemsize}")
    with jax.default_device(jax.devices("cpu")[0]):
        array = jax.dlpack.from_dlpack(plain)
    if rows.size and array.unsafe_buffer_pointer() != rows.ctypes.data:
        raise RuntimeError("this version of JAX copies host memory instead of sharing it")
    return array


def address_of(rows: np.ndarray) -> UInt[Array, "2"]:
    """The device address of host memory, to pass to programs as data; pins the memory until the process ends.

    Raises:
        ConfigError: the driver is missing, or refuses; the message says why.
    """
    pointer = _driver().register(rows)
    _pinned.append(rows)
    return jnp.asarray(np.array([pointer], np.uint64).view(np.uint32))


_pinned: list[np.ndarray] = []
"""Memory registered with the driver, which must not be unmapped while a program may read it."""


class _Driver:
    """The few CUDA driver calls that make host memory readable by kernels."""

    def __init__(self, library: Any, ordinal: int) -> None:
        self._library = library
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        # The context that JAX computes in.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context

    def register(self, rows: np.ndarray) -> int:
        """Pins memory and returns its device pointer."""
        start, size = ctypes.c_void_p(rows.ctypes.data), ctypes.c_size_t(rows.nbytes)
        pointer = ctypes.c_uint64()
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemHostRegister_v2", start, size, ctypes.c_uint(_PORTABLE_AND_MAPPED), pinning=rows.nbytes)
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(pointer), start, ctypes.c_uint(0))
        return pointer.value

    def _call(self, name: str, *arguments: Any, pinning: int = 0) -> None:
        try:
            code = getattr(self._library, name)(*arguments)
        except AttributeError:
            raise ConfigError(f"table_place=host: the CUDA driver has no {name}; it is too old") from None
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        reason = f"{name} answered {(text.value or b'an unknown error').decode()} ({code})"
        advice = f" when asked to pin {pinning / 1e9:.1f} GB{_lock_limit()}" if pinning else ""
        raise ConfigError(f"table_place=host: the CUDA driver refused: {reason}{advice}; use table_place=device")


@functools.cache
def _driver() -> _Driver:
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ConfigError(
            f"table_place=host: host memory can be pinned only for NVIDIA GPUs, and the device is a {device.platform}"
        )
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(f"table_place=host needs the CUDA driver, which cannot be loaded: {error}") from None
    return _Driver(library, device.local_hardware_id or 0)


def _lock_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "" if limit == resource.RLIM_INFINITY else f" (ulimit -l allows {limit / 1e9:.3g} GB to be locked; raise it)"
