"""Data types of settings."""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float64"]
