"""The model used to test question sets and tasks."""

import pathlib

import pytest

from memjax.config.data import DataConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.runs.load import LoadedModel


@pytest.fixture
def found(drawn_model, tmp_path: pathlib.Path) -> LoadedModel:
    """The model as returned by `memjax.load`."""
    config = RunConfig(model=drawn_model.config, data=DataConfig(sequence_length=32))
    return LoadedModel(drawn_model, ByteTokenizer(), config, 0, tmp_path / "checkpoints")
