"""Loads checkpoints of the PyTorch code of "Memory Layers at Scale" (arXiv:2412.09764): one layer, or a whole model.

The lookup is the same as here with qk_norm off and score_scale 1, and so are the gates, so parameters map one to one.
Only two layouts differ: matrices are [outputs, inputs] there, and rotary positions rotate neighbouring elements of a
head, where here they rotate elements half a head apart.
"""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.errors import CheckpointError
from memjax.interop.arrays import DTYPES
from memjax.interop.folders import file_in, read_json
from memjax.interop.huggingface.safetensors import TensorFiles, open_files
from memjax.interop.huggingface.tokenizer import read_tokenizer
from memjax.interop.official.lazy_array import LazyArray
from memjax.interop.official.tensors import VALUES, Arrays, memory_options, refuse_experts, shape_of, take, type_of
from memjax.interop.official.torch_zip import read_torch_zip
from memjax.interop.run import check_vocabulary, write_converted
from memjax.io.documents import line_of
from memjax.io.paths import local_path
from memjax.memory.layer import MemoryLayer
from memjax.memory.table import TableRows, ValueTable
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts
from memjax.runs.files import check_new
from memjax.runs.layout import params_to_tree, tree_to_params

WEIGHTS = ("consolidated.safetensors", "consolidated.pth")
SETTINGS = "params.json"
TOP_K = 32
"""Default of mem_knn, the slots that each head reads, in the official code; it cannot be inferred from shapes."""


def load_layer(
    arrays: Arrays, *, top_k: int = TOP_K, implementation: str | None = None
) -> tuple[MemoryLayer, ValueTable]:
    """Loads one memory layer of the official code, and its table.

    Args:
        arrays: by their names within the layer: `keys`, `values.weight`, `query_proj.query_mlps.0.weight`, ... A layer
            that shares its table with others needs `values.weight` too.
        top_k: slots that each head reads (mem_knn), which cannot be inferred from shapes.
        implementation: of search and bag; None takes the fastest that can run.

    Raises:
        CheckpointError: arrays are missing, left over, or do not fit each other; or memjax has no such layer.
        ValueError: top_k is more than the layer's sub-keys per half.
    """
    place = "the layer"
    named = {f"feed_forward.{name}": array for name, array in arrays.items()}
    refuse_experts(named, place)
    values = shape_of(named, VALUES, place)
    options = memory_options(named, "", values, place)
    rows, dense = named.pop(VALUES), named
    kwargs = {"top_k": top_k, "implementation": implementation, "param_dtype": jnp.dtype(type_of(dense, place))}
    dim = shape_of(dense, "feed_forward.query_proj.query_mlps.0.weight", place)[1]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MemoryLayer(dim, **options, **kwargs, rngs=nnx.Rngs(0))))
    tree = {"memory": nnx.to_pure_dict(state)}
    nnx.replace_by_pure_dict(state, take(dense, tree, place, block="")["memory"])
    table = nnx.eval_shape(lambda: ValueTable(*values, rngs=nnx.Rngs(0)))
    table.rows = TableRows(_table(rows, place))
    return nnx.merge(graphdef, state), table


def load_decoder(arrays: Arrays, settings: Mapping[str, Any], *, place: str = "the checkpoint") -> Decoder:
    """Loads the decoder of a whole checkpoint.

    Args:
        arrays: by name: `tok_embeddings.weight`, `layers.0.attention.wq.weight`, ... A shared table may be given once,
            or once for every memory layer.
        settings: the params.json of the checkpoint, for what shapes do not determine: n_heads or head_dim, and, where
            they differ from the official code's defaults, rope_theta (10000), norm_eps (1e-5), sliding_window and, at
            any depth, mem_knn (32).
        place: the checkpoint's name in messages.

    Raises:
        CheckpointError: arrays or settings are missing, left over, or do not fit each other; or memjax has no such
            model.
    """
    refuse_experts(arrays, place)
    dense = {name: array for name, array in arrays.items() if not name.endswith(VALUES)}
    tables = _tables(arrays, place)
    config = _model_config(dense, {table: arrays[name] for table, name in tables.items()}, settings, place)
    parts = DecoderParts.of(config)
    params = take(dense, params_to_tree(parts.abstract_params), place, head_dim=config.head_width)
    rows = {table: _table(arrays[name], place) for table, name in tables.items()}
    return parts.merge(tree_to_params(parts, params), rows)


def from_official(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None
) -> RunConfig:
    """Writes a run with the model of an official checkpoint; returns its config.

    Args:
        folder: a folder with consolidated.safetensors or consolidated.pth, and params.json.
        out: the run's folder; new or empty.
        tokenizer: `byte`, or a file; None uses the tokenizer.json or tokenizer.model in the folder.

    Raises:
        ConfigError: out is not empty, or `tokenizer` is of an unknown kind.
        DataError: the tokenizer cannot be read.
        CheckpointError: the model cannot be read, or out cannot be written.
    """
    check_new(out)
    folder = local_path(folder, "folder", CheckpointError)
    settings = read_json(file_in(folder, SETTINGS))
    with open_arrays(folder) as arrays:
        chosen, found = read_tokenizer(folder, tokenizer, settings)
        model = load_decoder(arrays, settings, place=str(folder))
    check_vocabulary(model.config, found, str(folder))
    return write_converted(out, model, found, chosen)


@contextlib.contextmanager
def open_arrays(folder: str | os.PathLike[str]) -> Iterator[Arrays]:
    """The arrays in a checkpoint's folder, by name; values are read on conversion to NumPy, within the block.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    folder = pathlib.Path(folder)
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        raise CheckpointError(f"{folder}: there is neither {' nor '.join(WEIGHTS)}; name a folder with one of them")
    file = file_in(folder, name)
    if file.suffix == ".pth":
        yield _state_dict(read_torch_zip(file), str(file))
        return
    with open_files([file]) as files:
        yield {name: _lazy(files, name) for name in files.tensors}


def _state_dict(tree: Any, place: str) -> Arrays:
    """The tensors of the model; training checkpoints keep them under `model`, next to the optimizer's."""
    found = tree["model"] if isinstance(tree, dict) and isinstance(tree.get("model"), dict) else tree
    if not isinstance(found, dict):
        raise CheckpointError(f"{place}: holds a {type(found).__name__}, must hold tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, LazyArray):
            raise CheckpointError(
                f"{place}: {str(name)[:80]!r} is a {type(value).__name__}, must be a tensor with a name"
            )
    return found


def _lazy(files: TensorFiles, name: str) -> LazyArray:
    tensor = files.tensors[name]
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{tensor.file}: {name} is of type {tensor.dtype}, must be one of {', '.join(DTYPES)}")
    return LazyArray(tensor.shape, jnp.dtype(DTYPES[tensor.dtype]), lambda: files.read(name))


def _memory_layers(arrays: Arrays) -> list[int]:
    matches = (re.fullmatch(r"layers\.(\d{1,4})\.feed_forward\.keys", name) for name in arrays)
    return sorted(int(found[1]) for found in matches if found)


def _tables(arrays: Arrays, place: str) -> dict[str, str]:
    """The name of each table's array, by table name."""
    layers = _memory_layers(arrays)
    names = {layer: f"layers.{layer}.{VALUES}" for layer in layers}
    present = [layer for layer in layers if names[layer] in arrays]
    if stray := sorted(name for name in arrays if name.endswith(VALUES) and name not in names.values()):
        raise CheckpointError(f"{place}: {stray[0]} belongs to no memory layer: there are no keys next to it")
    if not layers:
        return {}
    if len(present) not in (1, len(layers)):
        raise CheckpointError(
            f"{place}: values.weight exists for the layers {present} of {layers}; a shared table must exist once or "
            "for every layer, separate tables for every layer"
        )
    first, *others = present
    if all(_is_same(arrays[names[first]], arrays[names[other]]) for other in others):
        return {"shared": names[first]}
    return {f"layer_{layer}": names[layer] for layer in layers}


def _is_same(one: Any, other: Any) -> bool:
    return tuple(one.shape) == tuple(other.shape) and np.array_equal(np.asarray(one), np.asarray(other))


def _table(array: Any, place: str) -> jax.Array:
    return jnp.asarray(np.asarray(array), jnp.dtype(type_of({"values.weight": array}, place)))


def _model_config(dense: Arrays, tables: Arrays, settings: Mapping[str, Any], place: str) -> ModelConfig:
    known = settings["model"] if isinstance(settings.get("model"), Mapping) else settings
    layers = sorted({int(found[1]) for name in dense if (found := re.match(r"layers\.(\d{1,4})\.", name))})
    if layers != list(range(len(layers))):
        raise CheckpointError(f"{place}: has the layers {layers}, must have all from 0")
    vocab_size, dim = shape_of(dense, "tok_embeddings.weight", place)
    queries, keys = (shape_of(dense, f"layers.0.attention.{name}.weight", place)[0] for name in ("wq", "wk"))
    head_dim = _head_dim(known, queries, keys, place)
    hidden = [array.shape[0] for name, array in dense.items() if name.endswith(".feed_forward.w1.weight")]
    for name in ("use_scaled_rope", "rope_scaling"):
        if known.get(name):
            raise CheckpointError(
                f"{place}: {name}={known[name]!s:.40} in {SETTINGS} asks for scaled rotary frequencies, which are not "
                "converted"
            )
    try:
        return ModelConfig(
            dim=dim,
            num_layers=len(layers),
            num_heads=queries // head_dim,
            num_kv_heads=keys // head_dim,
            head_dim=None if queries == dim else head_dim,
            ffn_dim=hidden[0] if hidden else dim,
            vocab_size=vocab_size,
            rope_theta=_number(known, "rope_theta", 10000.0, place),
            norm_eps=_number(known, "norm_eps", 1e-5, place),
            sliding_window=known.get("sliding_window"),
            tie_embeddings="output.weight" not in dense,
            param_dtype=type_of(dense, place),
            memory=_memory_config(dense, tables, settings, place) if tables else None,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: describes an impossible model: {line_of(error)}") from error


def _memory_config(dense: Arrays, tables: Arrays, settings: Mapping[str, Any], place: str) -> MemoryConfig:
    layers, table = _memory_layers(dense), next(iter(tables.values()))
    found = [memory_options(dense, f"layers.{layer}.", tuple(table.shape), place) for layer in layers]
    if any(options != found[0] for options in found):
        raise CheckpointError(
            f"{place}: the memory layers {layers} differ in kind or size, which memjax does not support"
        )
    return MemoryConfig(
        layers=tuple(layers),
        top_k=_find(settings, "mem_knn", TOP_K),
        shared_table="shared" in tables,
        table_dtype=type_of(tables, place),
        **found[0],
    )


def _number(known: Mapping[str, Any], name: str, default: float, place: str) -> float:
    """A positive number in the settings; null is the default."""
    value = default if known.get(name) is None else known[name]
    # Integers may be too large for a float.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{place}: {name}={value!s:.40} in {SETTINGS} must be a positive number")
    return float(value)


def _head_dim(known: Mapping[str, Any], queries: int, keys: int, place: str) -> int:
    """Width of an attention head."""
    heads, width = (known.get(name) or 0 for name in ("n_heads", "head_dim"))
    if not heads and not width:
        raise CheckpointError(
            f"{place}: {SETTINGS} must have n_heads or head_dim, which cannot be inferred from shapes"
        )
    found = (width or queries // heads) if type(heads) is type(width) is int else 0
    if found < 1 or queries % found or keys % found or (heads and heads * found != queries):
        raise CheckpointError(
            f"{place}: n_heads={known.get('n_heads')!s:.40} and head_dim={known.get('head_dim')!s:.40} in {SETTINGS} "
            f"do not fit queries of width {queries} and keys of width {keys}"
        )
    return found


def _find(tree: Any, name: str, default: Any) -> Any:
    """The value of this name anywhere in nested settings."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            if node.get(name) is not None:
                return node[name]
            pending += list(node.values())[::-1]
    return default
