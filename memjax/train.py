"""Trains a model: `python -m memjax.train [CONFIG.yaml] [--section.key value ...]`."""

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memjax.config.arguments import take
from memjax.config.load import Parsed, parse
from memjax.config.run import RunConfig
from memjax.training.interrupt import run_program

if TYPE_CHECKING:
    from memjax.training.hook import Periodic

FLAGS = {
    "dry_run": "Print parameters, arithmetic, mesh and what a step needs on each device, without allocating anything.",
    "device_gb": "With --dry_run: the memory of a device in GB; finds settings with which the run fits.",
    "devices": "With --device_gb: how many such devices there are (default 1).",
    "allow_changed": "Continue a run although its settings have changed.",
}


def main(argv: Sequence[str] | None = None, *, hooks: Sequence["Periodic"] = ()) -> int:
    """Runs the command line, with these hooks in addition to the config's.

    Returns:
        0 done, 2 wrong settings, 3 unusable data, 4 checkpoint error, 5 a number was not finite, 6 other processes are
        missing, 7 out of memory, 75 stopped by a signal and saved, 130 interrupted before there was anything to save.
    """
    device_gb, words = take(sys.argv[1:] if argv is None else argv, "device_gb")
    devices, words = take(words, "devices")
    arguments: Parsed[RunConfig] = parse(
        RunConfig,
        words,
        prog="python -m memjax.train",
        description=(
            "Trains a language model with memory layers. Without arguments: the quick start, a small model that learns "
            "generated facts on a CPU. The same command resumes an unfinished run."
        ),
        flags=FLAGS,
    )
    _prepare_environment(arguments.config)
    # Imported late: the environment must be set before JAX starts, and wrong settings should not wait for its import.
    from memjax.io import compilation_cache
    from memjax.io.command import exit_code
    from memjax.sharding.processes import run_together
    from memjax.training.main import dry_run, train

    compilation_cache.enable(arguments.config.run.compile_cache)
    if "dry_run" in arguments.flags or device_gb or devices:
        planned = lambda: _devices(device_gb, devices, is_dry="dry_run" in arguments.flags)
        return exit_code(lambda: dry_run(arguments.config, fit_to=planned()))
    allow_changed = "allow_changed" in arguments.flags
    run = lambda: exit_code(lambda: train(arguments.config, allow_changed=allow_changed, hooks=hooks))
    return exit_code(lambda: run_together(arguments.config.processes, run))


def _devices(device_gb: Sequence[str], devices: Sequence[str], *, is_dry: bool) -> tuple[int, int] | None:
    """Memory of a device in bytes, and the number of devices; None if neither is given.

    Raises:
        ConfigError: the numbers are malformed, or it is not a dry run.
    """
    from memjax.errors import ConfigError

    if not device_gb and not devices:
        return None
    size, count = (device_gb or [""])[-1], (devices or ["1"])[-1]
    problems = []
    if not is_dry:
        problems.append(f"device_gb={size} is for planning; add --dry_run, or leave it out to train")
    # At most six digits: no device has more, and a very long number cannot be converted.
    if not re.fullmatch(r"\d{0,6}(\.\d+)?", size) or not float(size or 0):
        problems.append(f"device_gb={size} must be the memory of a device in GB, such as 80")
    if not re.fullmatch(r"\d{1,6}", count) or not int(count):
        problems.append(f"devices={count} must be a whole number of devices, at least 1")
    if problems:
        raise ConfigError(problems)
    return int(float(size) * 1e9), int(count)


def _prepare_environment(config: RunConfig) -> None:
    """Sets environment variables that JAX and XLA read at start-up; those that the user has set are kept."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    # XLA's start-up messages would hide ours.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if config.run.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


if __name__ == "__main__":
    run_program(main)
