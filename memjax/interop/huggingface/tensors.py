"""The parameters of a decoder under Hugging Face's names: those of Llama, and similar ones for memory layers."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.checkpoint.names import flatten, nest
from memjax.config.model import ModelConfig
from memjax.errors import CheckpointError
from memjax.interop.arrays import DTYPES, common_type, compare_shapes, own
from memjax.interop.huggingface.safetensors import StoredTensor, TensorFiles, TensorToWrite, write_tensors
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder, writable
from memjax.runs.layout import params_to_tree, tree_to_params
from memjax.runs.saved import with_dtypes

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TABLE = "model.tables.{}.weight"
_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".attn.bias",
    ".self_attn.bias",
    ".masked_bias",
    ".position_ids",
    ".causal_mask",
)
"""Suffixes of the names of buffers, which are not parameters."""
_WRAPPERS = ("module.", "_orig_mod.")
"""Name prefixes of models that were saved inside another torch module."""
_WITHOUT_HEAD = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")
_IN_MODEL = {"embed/embedding": _EMBEDDING, "norm/scale": "model.norm.weight", "head/kernel": _HEAD}
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mixer_norm": "post_attention_layernorm"},
    "post": {"attention_norm": "post_attention_layernorm", "mixer_norm": "post_feedforward_layernorm"},
}
_IN_BLOCK = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "feed_forward/gate": "mlp.gate_proj",
    "feed_forward/up": "mlp.up_proj",
    "feed_forward/down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    """A parameter and its name in a file."""

    name: str
    leaf: Any
    transposed: bool
    """Whether the file holds the transpose: torch keeps matrices as [outputs, inputs]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return self.leaf.shape[::-1] if self.transposed else self.leaf.shape


def read_model(files: TensorFiles, config: ModelConfig, place: str) -> Decoder:
    """Builds the decoder that a config describes from the weights in files, read one at a time.

    Parameters get the narrowest type that holds them all; float16, in which no decoder computes, becomes float32.

    Raises:
        CheckpointError: tensors are missing, left over, of unsupported types, or of shapes that contradict the config.
    """
    stored, names = _parameters(files, config, place)
    if config.num_layers > len(stored):  # before a decoder with that many layers is built
        raise CheckpointError(
            f"{place}: num_layers={config.num_layers} are more than the {len(stored)} tensors there are"
        )
    parts = DecoderParts.of(_with_stored_types(config, stored, place))
    wanted = _tensors(params_to_tree(parts.abstract_params), parts.abstract_tables, config)
    head = f"{place}: weights and config.json do not belong together; download or copy both again"
    compare_shapes({tensor.name: tensor.shape for tensor in wanted.values()}, stored, head)

    def read(path: str, leaf: Any) -> jax.Array:
        tensor = wanted[path]
        array = files.read(names[tensor.name])
        return own(array.T if tensor.transposed else array, leaf.dtype)

    params = {path: read(path, leaf) for path, leaf in flatten(params_to_tree(parts.abstract_params)).items()}
    tables = {name: read(f"tables/{name}", leaf) for name, leaf in parts.abstract_tables.items()}
    return parts.merge(tree_to_params(parts, nest(params)), tables)


def _parameters(files: TensorFiles, config: ModelConfig, place: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The parameters in the files by their standard names, and their names in the files.

    Buffers, which every program recomputes, are left out. Names lack the prefix `model.` if the model was saved without
    its head, and have another prefix if it was saved inside another module. Tied embeddings may be stored under either
    of their names.
    """
    names = {name: name for name in files.tensors if not name.endswith(_BUFFERS)}
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): stored for name, stored in names.items()}
    if names and all(name.startswith(_WITHOUT_HEAD) for name in names):
        names = {f"model.{name}": stored for name, stored in names.items()}
    if config.tie_embeddings and _HEAD in names:
        if _EMBEDDING in names:
            _check_tied(files, names, place)
        names[_EMBEDDING] = names.get(_EMBEDDING, names[_HEAD])
        del names[_HEAD]
    elif not config.tie_embeddings and _EMBEDDING in names and _HEAD not in names:
        raise CheckpointError(
            f"{place}: {_HEAD} is missing while tie_word_embeddings=false; set it to true in config.json if the output "
            "shares the weights of the embedding, or download the model again"
        )
    return {name: files.tensors[stored] for name, stored in names.items()}, names


def write_model(folder: pathlib.Path, model: Decoder, *, dtype: str | None, max_bytes: int) -> None:
    """Writes the weights as safetensors files of at most max_bytes (or one tensor each), rounded to dtype if given."""
    write_tensors(
        folder,
        [
            TensorToWrite(
                tensor.name,
                tensor.shape,
                jnp.dtype(dtype or tensor.leaf.dtype),
                functools.partial(_in_file, tensor, dtype),
            )
            for tensor in _tensors_of(model)
        ],
        max_bytes=max_bytes,
    )


def compare_bits(model: Decoder, files: TensorFiles, *, dtype: str | None) -> None:
    """Reads every tensor back; CheckpointError if one differs from the model's."""
    for tensor in _tensors_of(model):
        if _in_file(tensor, dtype).tobytes() != files.read(tensor.name).tobytes():
            raise CheckpointError(
                f"{files.tensors[tensor.name].file}: tensor {tensor.name!r} is not what was written; is the disk sound?"
            )


def _tensors_of(model: Decoder) -> list[_Tensor]:
    _, params, tables = split_decoder(model)
    return list(_tensors(params_to_tree(params), writable(tables), model.config).values())


def _tensors(params: dict[str, Any], tables: dict[str, Any], config: ModelConfig) -> dict[str, _Tensor]:
    """Every parameter by its path in the decoder; tables come last, because they may fill files of their own."""
    in_block = _IN_BLOCK | _NORMS[config.norm_placement]
    flat = flatten(params).items()
    found = {path: _Tensor(_name(path, in_block), leaf, path.endswith("/kernel")) for path, leaf in flat}
    found |= {f"tables/{name}": _Tensor(_TABLE.format(name), leaf, False) for name, leaf in tables.items()}
    return found


def _name(path: str, in_block: dict[str, str]) -> str:
    """The name in the file of the parameter at a path, given the names of a block's modules."""
    if path in _IN_MODEL:
        return _IN_MODEL[path]
    _, layer, inner = path.split("/", 2)
    module, _, last = inner.rpartition("/")
    if last == "kernel" or (last == "scale" and module.endswith("_norm")):
        last = "weight"
    known = f"{in_block.get(module, module)}.{last}"
    return f"model.layers.{layer}.{known.replace('/', '.')}"


def _in_file(tensor: _Tensor, dtype: str | None) -> np.ndarray:
    array = np.asarray(tensor.leaf)
    return np.ascontiguousarray(array.T if tensor.transposed else array, dtype and jnp.dtype(dtype))


def _with_stored_types(config: ModelConfig, stored: dict[str, StoredTensor], place: str) -> ModelConfig:
    """The config with the types of the parameters and tables in the files."""
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{place}: tensor {name!r} is of type {tensor.dtype}, must be one of {', '.join(DTYPES)}: quantised "
                "weights are not read; take the model as it was before it was quantised"
            )
    types = {name: DTYPES[tensor.dtype] for name, tensor in stored.items()}
    tables = {
        kind: {_TABLE.format(name) for layer in section.layers for name in section.tables(layer)}
        for kind, section in config.lookup_sections.items()
    }
    of = lambda names: common_type((types[name] for name in names if name in types), place)
    dense = of(types.keys() - set().union(*tables.values()))
    config = with_dtypes(config, tables={kind: of(names) for kind, names in tables.items()})
    return dataclasses.replace(config, param_dtype=dense)


def _check_tied(files: TensorFiles, names: dict[str, str], place: str) -> None:
    embedding, head = (files.read(names[name]) for name in (_EMBEDDING, _HEAD))
    if not np.array_equal(embedding, head):
        raise CheckpointError(
            f"{place}: tie_word_embeddings=true, yet {_HEAD} differs from {_EMBEDDING}; set it to false in config.json "
            "if the output has its own weights"
        )
