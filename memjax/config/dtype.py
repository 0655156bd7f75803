"""The types of numbers that settings name."""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float64"]
