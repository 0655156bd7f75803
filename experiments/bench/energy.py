"""Measures a GPU's energy with NVIDIA's management library, which comes with the driver."""

import ctypes
import os
import time
from typing import Any

LIBRARIES = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1", "/usr/lib64-nvidia/libnvidia-ml.so.1")


class EnergyMeter:
    """Joules since an arbitrary time, from the GPU's counter or, if that cannot be read, from its power over time.

    The counter changes about ten times a second, and power is a mean over the last second: only differences over longer
    spans of steady work are meaningful.
    """

    def __init__(self, library: Any, device: Any):
        """Takes the initialised library and a device handle."""
        self._library, self._device = library, device
        self._joules, self._last = 0.0, time.monotonic()
        self.source = "counter" if self._counter() is not None else "power"

    @classmethod
    def find(cls) -> "EnergyMeter | None":
        """A meter of the first visible GPU; None without a GPU, or if neither energy nor power can be read."""
        library = next(filter(None, map(_load, LIBRARIES)), None)
        if library is None or library.nvmlInit_v2():
            return None
        device = ctypes.c_void_p()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if first.isdigit():
            failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(first)), ctypes.byref(device))
        else:
            failed = library.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(device))
        if failed:
            return None
        meter = cls(library, device)
        return meter if meter.source == "counter" or meter.watts() is not None else None

    def joules(self) -> float:
        """The current reading in joules."""
        counted = self._counter()
        if counted is not None:
            return counted
        now, watts = time.monotonic(), self.watts()
        self._joules += (watts or 0.0) * (now - self._last)
        self._last = now
        return self._joules

    def watts(self) -> float | None:
        """The current power, as reported by the library."""
        milliwatts = ctypes.c_uint()
        failed = self._library.nvmlDeviceGetPowerUsage(self._device, ctypes.byref(milliwatts))
        return None if failed else milliwatts.value / 1e3

    def _counter(self) -> float | None:
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(millijoules))
        return None if failed else millijoules.value / 1e3


def _load(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
