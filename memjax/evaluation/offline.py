"""Keeps lm-eval and the libraries below it from the network."""

import os

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def forbid_downloads() -> None:
    """Makes libraries that are imported after this look for data on this machine only.

    They read environment variables when they are imported; those that the user has set stay.
    """
    for name, value in _OFFLINE.items():
        os.environ.setdefault(name, value)
