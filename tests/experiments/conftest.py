"""The experiments' shared code is no part of the package: tests find it as run.py does."""

import pathlib
import sys

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
sys.path[:0] = [*(str(EXPERIMENTS / name) for name in ("004_real_text", "005_continual_learning")), str(EXPERIMENTS)]
