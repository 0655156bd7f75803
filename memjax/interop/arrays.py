"""Arrays in files of other programs: their types, and whether they match a model."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from memjax.errors import CheckpointError, shown

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Supported types, by their names in safetensors files."""


def own(array: np.ndarray, dtype: Any) -> jax.Array:
    """Copies an array to the device; the given one may be a view of a file."""
    return jax.device_put(np.array(array, dtype, order="C", copy=True))


def common_type(names: Iterable[str], place: str) -> Literal["float32", "bfloat16", "float64"]:
    """The narrowest parameter type that can hold arrays of all these types; float16 needs float32.

    Raises:
        CheckpointError: one is float64, while JAX computes in 32 bits.
    """
    wider = set(names) - {"bfloat16"}
    if "float64" in wider and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(f"{place}: arrays are in float64; set JAX_ENABLE_X64=1 to read them")
    return "float64" if "float64" in wider else "float32" if wider else "bfloat16"


def compare_shapes(wanted: Mapping[str, Any], found: Mapping[str, Any], head: str) -> None:
    """Raises CheckpointError for arrays that are missing, left over or of another shape; `head` begins the message."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not part of this model" for name in found if name not in wanted]
    problems += [
        f"{name} has the shape {list(found[name].shape)}, must have {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    if problems:
        raise CheckpointError("\n  ".join([head, *shown(problems, 8)]))
