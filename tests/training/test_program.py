"""The training program that a config describes."""

import dataclasses

import pytest

from memjax.config.run import RunConfig
from memjax.models.parts import DecoderParts
from memjax.training.program import TrainProgram


@pytest.mark.parametrize(("deterministic", "expected"), [(False, None), (True, "chunked")])
def test_deterministic_runs_do_not_use_nondeterministic_attention(monkeypatch, deterministic, expected):
    asked = []

    def parts_of(config, *, implementation, attention):
        asked.append(attention)
        raise LookupError

    monkeypatch.setattr(DecoderParts, "of", parts_of)
    config = RunConfig()
    with pytest.raises(LookupError):
        TrainProgram.of(dataclasses.replace(config, run=dataclasses.replace(config.run, deterministic=deterministic)))
    assert asked == [expected]
