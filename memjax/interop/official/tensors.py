"""Names and shapes of the official code's parameters, and how to convert their layout."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.checkpoint.names import flatten
from memjax.errors import CheckpointError, shown
from memjax.interop.arrays import DTYPES, common_type, compare_shapes, own

Arrays = Mapping[str, Any]
"""Arrays by name: NumPy's, JAX's, or LazyArrays."""

VALUES = "feed_forward.values.weight"
_KEYS = "feed_forward.keys"
_QUERY = "feed_forward.query_proj.query_mlps.0.weight"
_TURNED = ("attention/query/kernel", "attention/key/kernel")
"""Parameters whose outputs are rotated by position."""
_IN_BLOCK = {
    "attention_norm/scale": "attention_norm.weight",
    "mixer_norm/scale": "ffn_norm.weight",
    "attention/query/kernel": "attention.wq.weight",
    "attention/key/kernel": "attention.wk.weight",
    "attention/value/kernel": "attention.wv.weight",
    "attention/out/kernel": "attention.wo.weight",
    "feed_forward/gate/kernel": "feed_forward.w1.weight",
    "feed_forward/up/kernel": "feed_forward.w3.weight",
    "feed_forward/down/kernel": "feed_forward.w2.weight",
    "memory/keys/keys": _KEYS,
    "memory/keys/query_kernel": _QUERY,
    "memory/keys/query_bias": "feed_forward.query_proj.query_mlps.0.bias",
    "memory/gate_proj/kernel": "feed_forward.swilu_projection.weight",
    "memory/gate_proj/bias": "feed_forward.swilu_projection.bias",
    "memory/value_proj/kernel": "feed_forward.value_proj.weight",
    "memory/value_proj/bias": "feed_forward.value_proj.bias",
    "memory/output_gate/kernel": "feed_forward.gating.weight",
    "memory/output_gate/bias": "feed_forward.gating.bias",
}
_IN_MODEL = {"embed/embedding": "tok_embeddings.weight", "norm/scale": "norm.weight", "head/kernel": "output.weight"}


def take(arrays: Arrays, tree: Any, place: str, *, head_dim: int = 2, block: str | None = None) -> Any:
    """Replaces the shapes in a tree of parameters with the official arrays, all of which must be used.

    If the tree is that of a single block, `block` is the prefix of its arrays' names.

    Raises:
        CheckpointError: arrays are missing, left over or of other shapes.
    """
    leaves = flatten(tree)
    names = {path: _name(path) if block is None else block + _IN_BLOCK[path] for path in leaves}
    wanted = {names[path]: _shape_there(path, leaf.shape) for path, leaf in leaves.items()}
    head = f"{place}: these are not the arrays of an official checkpoint, as its shapes describe it:"
    compare_shapes(wanted, arrays, head)
    found = [_arranged(path, np.asarray(arrays[names[path]]), leaf, head_dim) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def memory_options(arrays: Arrays, block: str, values: tuple[int, ...], place: str) -> dict[str, Any]:
    """The arguments of `MemoryLayer` that follow from the shapes of its arrays and table.

    Raises:
        CheckpointError: arrays are missing or do not fit each other, or memjax has no such layer.
    """
    (rows, half), (queries, dim) = shape_of(arrays, block + _KEYS, place), shape_of(arrays, block + _QUERY, place)
    num_slots, value_dim = values
    num_keys = math.isqrt(num_slots)
    if num_keys**2 != num_slots or not num_keys or rows % (2 * num_keys) or queries * num_keys != rows * half:
        raise CheckpointError(
            f"{place}: {block}{_KEYS} {[rows, half]}, query_mlps.0.weight {[queries, dim]} and values.weight "
            f"{list(values)} do not fit each other: with n**2 rows of values, keys must be [2 * heads * n, key_dim / "
            "2] and the query [heads * key_dim, dim]"
        )
    has = lambda path: block + _IN_BLOCK[f"memory/{path}/kernel"] in arrays
    if has("value_proj") and not has("gate_proj") and value_dim == dim:
        raise CheckpointError(
            f"{place}: {block}feed_forward.value_proj without swilu_projection, for values as wide as the model, is "
            "not a layer of the paper, and memjax has no such layer"
        )
    gate: Literal["silu", "none"] = "silu" if has("gate_proj") else "none"
    return {
        "num_keys": num_keys,
        "num_heads": rows // (2 * num_keys),
        "key_dim": 2 * half,
        "value_dim": value_dim,
        "gate": gate,
        "output_gate": has("output_gate"),
        "qk_norm": False,
        "score_scale": 1.0,
    }


def refuse_experts(arrays: Arrays, place: str) -> None:
    """Raises CheckpointError if there is a PEER layer."""
    for name in arrays:
        if ".values_u." in name or ".values_v." in name:
            raise CheckpointError(
                f"{place}: {name} belongs to a PEER layer; those of official checkpoints are not read"
            )


def shape_of(arrays: Arrays, name: str, place: str) -> tuple[int, int]:
    """The shape of a matrix; CheckpointError if it is missing, or not a matrix."""
    if name not in arrays:
        raise CheckpointError(f"{place}: {name} is missing; there are {', '.join(shown(sorted(arrays), 6))}")
    shape = tuple(arrays[name].shape)
    if len(shape) != 2:
        raise CheckpointError(f"{place}: {name} has the shape {list(shape)}, must be a matrix")
    return shape[0], shape[1]


def type_of(arrays: Arrays, place: str) -> Literal["float32", "bfloat16", "float64"]:
    """The narrowest parameter type that can hold all of the arrays.

    Raises:
        CheckpointError: an array is not floating-point, or is float64 while JAX computes in 32 bits.
    """
    names = {name: jnp.dtype(array.dtype).name for name, array in arrays.items()}
    for name, dtype in names.items():
        if dtype not in DTYPES.values():
            raise CheckpointError(f"{place}: {name} is of type {dtype}, must be floating-point")
    return common_type(names.values(), place)


def _name(path: str) -> str:
    """The official name of a parameter of the decoder."""
    if path in _IN_MODEL:
        return _IN_MODEL[path]
    _, layer, inner = path.split("/", 2)
    return f"layers.{layer}.{_IN_BLOCK[inner]}"


def _shape_there(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path.endswith("keys/keys"):
        return (math.prod(shape[:3]), shape[3])
    return shape[::-1] if path.endswith("kernel") else shape


def _arranged(path: str, array: np.ndarray, leaf: Any, head_dim: int) -> jax.Array:
    if path.endswith(_TURNED):
        # Neighbours (2 i, 2 i + 1) of a head become (i, i + head_dim / 2).
        heads = array.reshape(-1, head_dim // 2, 2, array.shape[-1])
        array = heads.swapaxes(1, 2).reshape(array.shape)
    array = array.reshape(leaf.shape) if path.endswith("keys/keys") else array.T if path.endswith("kernel") else array
    return own(array, leaf.dtype)
