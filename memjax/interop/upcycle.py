"""Upcycling: adds memory layers to a trained dense model, which keeps what it knows."""

import dataclasses
import os
from typing import Any, Literal

import jax

from memjax.checkpoint.names import flatten, nest
from memjax.config.memory import MemoryConfig
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder
from memjax.ops.precision import truncated
from memjax.runs.files import check_new
from memjax.runs.layout import params_to_tree, tree_to_params
from memjax.runs.load import load
from memjax.runs.write import write_run


def upcycle(model: Decoder, memory: MemoryConfig, *, seed: int = 0) -> Decoder:
    """Adds memory layers to a dense model.

    With placement 'parallel', every block keeps its feed-forward layer, and the outputs are those of the dense model,
    bit for bit, until training moves the memory's scale away from zero. With 'replace', the feed-forward layers in
    memory.layers are removed, and what they knew is lost.

    Args:
        model: a model without memory layers; the new model shares its arrays.
        memory: the memory layers.
        seed: seed of their initial parameters and of the tables.

    Raises:
        ValueError: the model already has memory layers or experts, memory.layers names a block that it lacks, or
            memory.table_dtype is float64 while JAX's 64-bit types are off.
    """
    if model.config.experts is not None or model.config.peer is not None:
        raise ValueError("the model has experts in place of feed-forward layers; only a dense one can be given memory")
    if model.config.memory is not None:
        raise ValueError(
            f"the model already has memory layers, in blocks {list(model.config.memory.layers)}; only a dense model "
            "can be given some"
        )
    if problems := truncated({"memory.table_dtype": memory.table_dtype}):
        raise ValueError(problems[0])
    parts = DecoderParts.of(dataclasses.replace(model.config, memory=memory))
    wanted = flatten(params_to_tree(parts.abstract_params))
    kept = {name: leaf for name, leaf in flatten(params_to_tree(split_decoder(model)[1])).items() if name in wanted}

    @jax.jit
    def draw(key: jax.Array) -> tuple[dict[str, Any], Any]:
        params, tables = parts.init(key)
        return {name: leaf for name, leaf in flatten(params_to_tree(params)).items() if name not in kept}, tables

    new, tables = draw(jax.random.key(seed))
    return parts.merge(tree_to_params(parts, nest(kept | new)), tables)


def upcycle_run(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    memory: MemoryConfig,
    *,
    step: int | Literal["latest", "best"] = "latest",
    seed: int = 0,
) -> None:
    """Writes a run with the model of a dense run and additional memory layers.

    `memjax.load` reads the folder; to train from it, use its `config.yaml` and `train.init_from`.

    Args:
        source: the folder of the dense run.
        target: the folder to write; new or empty.
        memory: the memory layers.
        step: the checkpoint of the dense run.
        seed: seed of the new parameters.

    Raises:
        ValueError: as `upcycle`.
        ConfigError: the target is not empty, or the memory does not fit the rest of the run's config.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    check_new(target)
    loaded = load(source, step=step)
    model = upcycle(loaded.model, memory, seed=seed)
    config = dataclasses.replace(loaded.config, model=dataclasses.replace(loaded.config.model, memory=memory))
    write_run(target, model, loaded.tokenizer, config)
