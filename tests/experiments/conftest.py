"""The experiments' shared code is no part of the package: tests find it as run.py does."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments"))
