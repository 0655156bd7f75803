"""The package lm-eval, which is optional: whether it is installed, and keeping it from the network."""

import importlib.util
import os
from collections.abc import Sequence

from memjax.errors import ConfigError

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def require_lm_eval(setting: str, tasks: Sequence[str]) -> None:
    """Raises ConfigError if there are tasks, which a setting asks for, but lm-eval is not installed."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{setting}={','.join(tasks)} needs the package lm-eval: pip install lm-eval")


def forbid_downloads() -> None:
    """Restricts libraries imported from now on to data on this machine.

    They read environment variables at import; those that the user has set are kept.
    """
    for name, value in _OFFLINE.items():
        os.environ.setdefault(name, value)
