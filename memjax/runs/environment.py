"""The environment of a run: command, versions, commit and devices."""

import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax


def command_line() -> str:
    """The command as it was typed: a console script is what its interpreter runs."""
    words = list(sys.orig_argv)
    if len(words) > 1 and pathlib.PurePath(words[1]).name == "memjax":
        words = ["memjax", *words[2:]]
    return shlex.join(words)


def environment() -> dict[str, Any]:
    """Command line, Python and package versions, commit and devices, as JSON values."""
    from importlib.metadata import version

    packages = (
        "memjax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "jax-triton",
        "triton",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except ImportError:  # not installed; memjax itself may run from a checkout
            versions[package] = None
    source = pathlib.Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": command_line(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "devices": [device.device_kind for device in jax.devices()],
    }
