"""The environment of a run: command, versions, commit and devices."""

import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax


def command_line() -> str:
    """The command as it was typed, although the console script runs as `python .../memjax`."""
    words = list(sys.orig_argv)
    if len(words) > 1 and pathlib.PurePath(words[1]).name == "memjax":
        words = ["memjax", *words[2:]]
    return shlex.join(words)


def environment() -> dict[str, Any]:
    """Command line, Python and package versions, commit and devices, as JSON values."""
    return {
        "command": command_line(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _commit(),
        "devices": [device.device_kind for device in jax.devices()],
    }


_PACKAGES = ("memjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "jax-triton", "triton")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except ImportError:  # not installed; memjax itself may run from a checkout
        return None


def _commit() -> str | None:
    """The commit of the checkout that memjax runs from; None for an installed package, or without git."""
    file = pathlib.Path(__file__)
    # This file must be in the commit, because memjax may be installed inside the checkout of another project.
    command = ["git", "-C", str(file.parent), "rev-parse", "HEAD", f"HEAD:./{file.name}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None
