"""Makes the experiments' shared code importable, as run.py does; it is not part of the package."""

import pathlib
import sys

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
sys.path[:0] = [*(str(EXPERIMENTS / name) for name in ("004_real_text", "005_continual_learning")), str(EXPERIMENTS)]
