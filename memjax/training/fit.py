"""`fit`: trains from Python, as `python -m memjax.train` does from the shell."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from memjax.config.load import load as load_config
from memjax.config.run import RunConfig
from memjax.config.schema import show
from memjax.errors import ConfigError
from memjax.io import compilation_cache
from memjax.io.command import give_threads_to_simulated_devices
from memjax.io.paths import local_path
from memjax.runs.load import LoadedModel, load
from memjax.sharding.processes import find
from memjax.training.hook import Periodic
from memjax.training.interrupt import RaisedInterrupt, catch_interrupts
from memjax.training.main import train

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_EARLY_ENDS = {5: "a loss or gradient was not a number", 7: "a device has too little memory", 75: "a signal stopped it"}


def fit(
    config: RunConfig | str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    allow_changed: bool = False,
    hooks: Sequence[Periodic] = (),
) -> LoadedModel:
    """Trains a run to its last step, or resumes it, and returns its model.

    A signal such as Ctrl-C saves after the current step; before there is anything to save, it raises KeyboardInterrupt.

    Args:
        config: the settings, or their source: a YAML file, the name of a preset, or the folder of a run. None takes the
            quick start.
        settings: values that replace these, by dotted name, such as {"train.steps": 100, "model.memory": None}.
        allow_changed: whether to resume a run even if its settings have changed.
        hooks: hooks in addition to those that the settings ask for.

    Raises:
        ConfigError, DataError, CheckpointError: as their names say; see `python -m memjax.train`.
        RuntimeError: the run ended before its last step; the message says why. Saved checkpoints are kept.
    """
    word = lambda value: os.fspath(value) if isinstance(value, str | os.PathLike) else show(value)
    words = [f"--{name}={word(value)}" for name, value in (settings or {}).items()]
    if isinstance(config, RunConfig):
        if words:
            raise ValueError("settings are for a file, a preset or a run; change a RunConfig itself")
    else:
        config = load_config(RunConfig, None if config is None else local_path(config, "config", ConfigError), words)
    _check(config)
    give_threads_to_simulated_devices()
    compilation_cache.enable(config.run.compile_cache)
    with catch_interrupts(kind=RaisedInterrupt):
        code = train(config, allow_changed=allow_changed, hooks=hooks)
    if code:
        raise RuntimeError(f"{config.run.dir}: the run ended early: {_EARLY_ENDS[code]}")
    return load(config.run.dir)


def _check(config: RunConfig) -> None:
    """Refuses settings that need a separate program, because they take effect before JAX starts."""
    problems = []
    if config.run.deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        problems.append(f"run.deterministic=True must be known before JAX starts: set XLA_FLAGS={_DETERMINISTIC} first")
    if find(config.processes, os.environ) is not None:
        problems.append("processes: several processes that train together are started by python -m memjax.train")
    if problems:
        raise ConfigError(problems)
