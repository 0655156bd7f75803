"""Converts models from and to Hugging Face's format: a folder with config.json, safetensors files and a tokenizer.

Llamas, Mistrals and their relatives are written as transformers writes them. A model with memory layers or experts uses
the same names for the same parts, has model_type memjax in its config.json, and comes with the code with which
transformers runs it.
"""

import dataclasses
import os
import pathlib
import shutil
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import CheckpointError, ConfigError, DataError
from memjax.interop.folders import file_in, read_json, write_json
from memjax.interop.huggingface.config import longest_text, read_model_config
from memjax.interop.huggingface.families import has_own_format
from memjax.interop.huggingface.safetensors import open_tensors
from memjax.interop.huggingface.tensors import compare_bits, read_model, write_model
from memjax.interop.huggingface.tokenizer import ADVICE, read_tokenizer
from memjax.interop.huggingface.tokenizer_files import GENERATION
from memjax.interop.huggingface.written_config import write_model_config
from memjax.interop.huggingface.written_tokenizer import write_tokenizer
from memjax.interop.model_card import CARD, generation_config, model_card
from memjax.interop.run import check_vocabulary, write_converted
from memjax.io.paths import local_path
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder
from memjax.ops.precision import resolve_dtype
from memjax.runs.files import check_new, written_whole
from memjax.runs.load import LoadedModel, load_as_saved
from memjax.runs.saved import with_dtypes

CONFIG = "config.json"
TORCH_MODEL = pathlib.Path(__file__).with_name("torch_model")
"""Code that is copied into folders of models with memory layers; never imported here, because it needs torch."""
_LONGEST_SEQUENCE = 2048
"""Upper limit of data.sequence_length of a new run: few machines have memory for the full context of some models."""
_KEPT_FIELDS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of the original config.json that have no setting here; they are kept."""
_KEPT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
"""Files of the original folder that are kept: all but weights and config.json."""
_TOLERANCE = 1e-4
"""Largest allowed difference between the logits of a model before and after it was written."""


def from_hf(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None
) -> RunConfig:
    """Writes a run with the model of a Hugging Face folder; returns its config.

    Args:
        folder: a folder with config.json, model.safetensors or its parts with an index, and a tokenizer.
        out: the run's folder; new or empty.
        tokenizer: `byte`, or a file; None uses the folder's own.

    Raises:
        ConfigError: out is not empty, or `tokenizer` is of an unknown kind.
        DataError: the tokenizer cannot be read.
        CheckpointError: the model cannot be read, or out cannot be written.
    """
    check_new(out)
    folder = local_path(folder, "folder", CheckpointError)
    place = str(folder / CONFIG)
    with open_tensors(folder) as files:
        fields = read_json(file_in(folder, CONFIG))
        described, length = read_model_config(fields, place), longest_text(fields, place)
        settings, found = read_tokenizer(folder, tokenizer, fields)
        check_vocabulary(described, found, place)
        model = read_model(files, described, str(folder))
    return write_converted(out, model, found, settings, sequence_length=min(length, _LONGEST_SEQUENCE))


def to_hf(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"] = "latest",
    ema: bool = False,
    dtype: str | None = None,
    longest: int | None = None,
    like: str | os.PathLike[str] | None = None,
    max_bytes: int = 5 * 10**9,
) -> bool:
    """Writes a run's model as a Hugging Face folder, after reading it back and checking that the logits are the same.

    Args:
        run: the run's folder.
        out: the folder to write; new or empty.
        step: the checkpoint.
        ema: use the moving average of the dense parameters.
        dtype: the type to which weights and tables are rounded; None keeps the saved types.
        longest: max_position_embeddings; None uses that of `like`, or the run's data.sequence_length.
        like: the folder that the run's model came from; its tokenizer files, chat template and generation settings are
            kept.
        max_bytes: largest file; a larger tensor gets a file of its own.

    Returns:
        Whether the folder has a tokenizer: the format does not support all kinds.

    Raises:
        ConfigError: out is not empty, or `like` has no readable tokenizer or another one than the run.
        CheckpointError: the run cannot be read, its logits are not finite, the format has no such model, or out cannot
            be written.
    """
    check_new(out)
    origin = None if like is None else local_path(like, "like", ConfigError)
    loaded = load_as_saved(run, step=step, ema=ema)
    model, tokenizer = _rounded(loaded.model, dtype), loaded.tokenizer
    card = model_card(loaded.config, model.config, step=loaded.step)
    fields = _fields(loaded, model, dtype, longest, origin)
    del loaded
    expected = _logits(model)
    if not np.isfinite(expected).all():
        raise CheckpointError(
            f"{run}: its logits are not finite, so nothing can be compared with them; its weights hold NaN, "
            "infinity or numbers that are too large: take another checkpoint"
        )
    with written_whole(out) as folder:
        write_json(folder / CONFIG, fields)
        write_json(folder / GENERATION, generation_config(tokenizer.bos_id, tokenizer.end_ids, tokenizer.pad_id))
        (folder / CARD).write_text(card, encoding="utf-8")
        if has_own_format(model.config):
            for file in sorted(TORCH_MODEL.glob("*.py")):
                shutil.copyfile(file, folder / file.name)
        if origin is None:
            has_tokenizer = write_tokenizer(folder, tokenizer)
        else:
            has_tokenizer = True  # `_kept_fields` has read it
            for name in _KEPT_FILES:
                if (origin / name).exists():
                    shutil.copyfile(file_in(origin, name), folder / name)
        write_model(folder, model, dtype=dtype, max_bytes=max_bytes)
        with open_tensors(folder) as files:
            compare_bits(model, files, dtype=dtype)
            del model  # or it would be in memory twice
            described = read_model_config(read_json(folder / CONFIG), str(folder / CONFIG))
            found = _logits(read_model(files, described, str(folder)))
        if not (difference := np.max(np.abs(found - expected))) <= _TOLERANCE:
            raise CheckpointError(
                f"{run}: as written to {out} the model gives other logits (by up to {difference:.2g}); nothing is "
                "kept. This is a bug in memjax: please report it with the run's config.yaml"
            )
    return has_tokenizer


def _fields(
    loaded: LoadedModel, model: Decoder, dtype: str | None, longest: int | None, origin: pathlib.Path | None
) -> dict[str, Any]:
    """The fields of config.json, some of which are kept from the original."""
    scaling = model.config.rope_scaling
    if longest is not None and scaling is not None and scaling.kind == "dynamic" and longest != scaling.original_length:
        raise CheckpointError(
            f"max_length={longest} must be {scaling.original_length} or left out: with rope_scaling.kind=dynamic "
            "max_position_embeddings is the length beyond which the frequencies change"
        )
    fields = write_model_config(
        model.config,
        dtype=dtype or model.config.param_dtype,
        longest=longest or loaded.config.data.sequence_length,
        bos=loaded.tokenizer.bos_id,
        eos=loaded.tokenizer.end_ids,
    )
    kept = {} if origin is None else _kept_fields(origin, loaded.tokenizer)
    return fields | (kept if longest is None else {**kept, "max_position_embeddings": longest})


def _kept_fields(folder: pathlib.Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The kept fields of the original config.json, after checking that the tokenizers are the same."""
    fields = read_json(file_in(folder, CONFIG))
    try:
        found = read_tokenizer(folder, None, fields)[1]
    except DataError as error:
        problem = str(error).replace(ADVICE, "").rstrip("; \n")
        raise ConfigError(
            f"like={folder} has no tokenizer to compare with the run's; leave like out: {problem}"
        ) from error
    if found.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"like={folder} has a different tokenizer from the run's; name the folder that its model came from"
        )
    return {name: fields[name] for name in _KEPT_FIELDS if name in fields}


def _rounded(model: Decoder, dtype: str | None) -> Decoder:
    """The model rounded to a type, with its tables in the type in which they will be read back.

    Sums of rows are rounded to the table's type, so another type would give other logits. The given model becomes
    unusable.
    """
    if dtype is None:
        return model
    _, params, tables = split_decoder(model)
    read_as = "float32" if dtype == "float16" else dtype

    def rounded(leaf: jax.Array, own: str | jnp.dtype) -> jax.Array:
        if jnp.promote_types(leaf.dtype, dtype) == dtype:
            return leaf.astype(own)
        narrow = leaf.astype(dtype)
        if not bool(jnp.isfinite(narrow).all()) and bool(jnp.isfinite(leaf).all()):
            raise CheckpointError(
                f"dtype={dtype} cannot hold numbers as large as {float(jnp.abs(leaf).max()):.3g}, which the model has; "
                "take bfloat16 or float32"
            )
        leaf.delete()  # or the whole model would be in memory twice
        return narrow.astype(own)

    config = with_dtypes(model.config, tables=dict.fromkeys(model.config.lookup_sections, read_as))
    params = jax.tree.map(lambda leaf: rounded(leaf, leaf.dtype), params)
    return DecoderParts.of(config).merge(params, jax.tree.map(lambda rows: rounded(rows, read_as), tables))


def _logits(model: Decoder) -> np.ndarray:
    """The model's logits for a few tokens, computed in float32 or wider whatever its own compute type is."""
    wide = "float64" if model.config.param_dtype == "float64" else "float32"
    if resolve_dtype(model.config.dtype) != wide:
        _, params, tables = split_decoder(model)
        model = DecoderParts.of(dataclasses.replace(model.config, dtype=wide)).merge(params, tables)
    tokens = np.arange(1, 25, dtype=np.int32)[None] * 7919 % model.config.vocab_size
    # Compiled as a whole, a dense model would also be in memory in the wider type; run operation by operation, only one
    # of its matrices is. A memory layer has many small operations, which would take too long to compile one by one.
    forward = nnx.jit(lambda model, tokens: model(tokens)) if model.config.lookups else Decoder.__call__
    return np.asarray(forward(model, jnp.asarray(tokens)))
