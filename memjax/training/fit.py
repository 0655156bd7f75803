"""Training as one function of Python: what `python -m memjax.train` does, without a process of its own."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from memjax.config.load import load as load_config
from memjax.config.run import RunConfig
from memjax.config.schema import show
from memjax.io import compilation_cache
from memjax.runs.load import LoadedModel, load
from memjax.training.main import train

_EARLY_ENDS = {5: "a loss or gradient was not a number", 7: "a device has too little memory", 75: "a signal stopped it"}


def fit(
    config: RunConfig | str | os.PathLike[str] | None = None, settings: Mapping[str, Any] | None = None
) -> LoadedModel:
    """Trains a run to its last step, or continues it, and returns its model.

    Args:
        config: the settings, or what they are read from: a YAML file, a preset's name, or the folder of a run. None is
            the quick start.
        settings: values by dotted name that replace these, such as {"train.steps": 100, "model.memory": None}.

    Raises:
        ConfigError, DataError, CheckpointError: what their names say; see `python -m memjax.train`.
        RuntimeError: the run ended before its last step; the message says why, and what is saved stays.
    """
    words = [
        word
        for name, value in (settings or {}).items()
        for word in (f"--{name}", value if isinstance(value, str) else show(value))
    ]
    if isinstance(config, RunConfig):
        if words:
            raise ValueError("settings replace those of a file, a preset or a run; of a RunConfig, change the object")
    else:
        config = load_config(RunConfig, pathlib.Path(config) if config is not None else None, words)
    compilation_cache.enable(config.run.compile_cache)
    code = train(config)
    if code:
        raise RuntimeError(f"{config.run.dir}: the run ended early: {_EARLY_ENDS[code]}")
    return load(config.run.dir)
