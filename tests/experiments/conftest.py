"""Makes the experiments' shared code, which is not part of the package, importable as in run.py."""

import pathlib
import sys

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
sys.path[:0] = [*(str(EXPERIMENTS / name) for name in ("004_real_text", "005_continual_learning")), str(EXPERIMENTS)]
