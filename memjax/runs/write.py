"""Write a model as the folder of a run, for `memjax.load` and `train.init_from`."""

import dataclasses
import os

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder, writable
from memjax.runs.files import written_whole
from memjax.runs.folder import Claim, RunFolder
from memjax.runs.layout import CHECKPOINTS, META, PARAMS, TABLES, meta_document, params_to_tree


def write_run(folder: str | os.PathLike[str], model: Decoder, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Atomically writes a run at step 0: config, environment, tokenizer, and a checkpoint of only the model.

    Raises:
        ConfigError: the folder is not empty.
        CheckpointError: it cannot be written.
    """
    _, params, tables = split_decoder(model)
    config = dataclasses.replace(config_of_copy(config, folder), model=model.config)
    items = {PARAMS: params_to_tree(params)} | ({TABLES: writable(tables)} if tables else {})
    with written_whole(folder) as path:
        with Checkpoints(path / CHECKPOINTS) as checkpoints:
            checkpoints.save(0, items, {META: meta_document(config, tokenizer, step=0)})
        Claim(RunFolder(path), config).record(0, tokenizer)


def config_of_copy(config: RunConfig, folder: str | os.PathLike[str]) -> RunConfig:
    """The config for a new run with the same model."""
    run = dataclasses.replace(config.run, dir=str(folder), mirror=None)  # the mirror belongs to the original run
    return dataclasses.replace(config, run=run, train=dataclasses.replace(config.train, init_from=None))
