"""Keeps lm-eval and its dependencies off the network."""

import os

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def forbid_downloads() -> None:
    """Restricts libraries imported from now on to data on this machine.

    They read environment variables at import; those that the user has set are kept.
    """
    for name, value in _OFFLINE.items():
        os.environ.setdefault(name, value)
