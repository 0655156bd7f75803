"""Writes a converted model as a run."""

import os

import jax
import jax.numpy as jnp

from memjax.checkpoint.names import flatten
from memjax.config.data import DataConfig, TokenizerConfig
from memjax.config.model import ModelConfig
from memjax.config.optim import OptimConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import CheckpointError
from memjax.io.console import warn
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder, writable
from memjax.runs.layout import PARAMS, TABLES, params_to_tree
from memjax.runs.write import write_run

_LEARNING_RATE = 2e-5
"""optim.lr of a converted run; that of the quick start would undo what the model has learned."""


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer, place: str) -> None:
    """Raises CheckpointError for a tokenizer with more tokens than the model has embeddings."""
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{place}: vocab_size={model.vocab_size} is less than the {tokenizer.vocab_size} tokens of the tokenizer; "
            "set --tokenizer to the one that the model was trained with"
        )


def write_converted(
    out: str | os.PathLike[str],
    model: Decoder,
    tokenizer: Tokenizer,
    settings: TokenizerConfig,
    *,
    sequence_length: int = DataConfig().sequence_length,
) -> RunConfig:
    """Writes a run with the model, to evaluate it or to start training from it; returns its config.

    Weights with NaN or infinity are kept, and a warning names them.

    Raises:
        CheckpointError: it cannot be written.
    """
    data = DataConfig(source="files", sequence_length=sequence_length, tokenizer=settings)
    config = RunConfig(model=model.config, data=data, optim=OptimConfig(lr=_LEARNING_RATE))
    for name in _not_finite(model):
        warn(f"warning: {name} holds NaN or infinity: results computed with it are not finite")
    write_run(out, model, tokenizer, config)
    return config


def _not_finite(model: Decoder) -> list[str]:
    _, params, tables = split_decoder(model)
    is_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())
    leaves = flatten({PARAMS: params_to_tree(params), TABLES: writable(tables)})
    return [name for name, leaf in leaves.items() if not is_finite(leaf)]
