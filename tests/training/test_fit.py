"""Training by a function call: where its settings come from, and how it ends."""

import signal
from typing import Any

import numpy as np
import pytest

import memjax
from memjax.config.run import RunConfig
from memjax.errors import ConfigError
from memjax.runs.load import LoadedModel
from memjax.training import fit as module


@pytest.fixture
def asked(monkeypatch) -> list[RunConfig]:
    """Records the configs that would be trained; `train.steps` serves as the exit code."""
    configs = []

    def train(config: RunConfig, **more: Any) -> int:
        assert more == {"allow_changed": False, "hooks": ()}
        configs.append(config)
        return config.train.steps if config.train.steps in (5, 7, 75) else 0

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "load", found_in)
    return configs


def found_in(path: str) -> LoadedModel:
    """A stand-in for a model that only records the run it was loaded from."""
    found = object.__new__(LoadedModel)
    object.__setattr__(found, "patches", (path,))
    return found


def test_settings_come_from_a_preset_a_file_a_run_or_an_object(asked, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: elsewhere}\nmodel: {dim: 96}")
    assert memjax.fit().patches[0] == "runs/quickstart"
    settings = {"model.dim": np.int64(32), "model.memory.layers": np.array([1]), "data.path": "a b"}
    settings |= {"optim.lr": np.logspace(-4, -2, 3)[1], "model.tie_embeddings": np.bool_(True)}
    assert memjax.fit("wiki_text", settings).patches[0] == "runs/wiki_text"
    assert memjax.fit(path, {"model.memory": None}).patches[0] == "elsewhere"
    assert memjax.fit(tmp_path).patches[0] == str(tmp_path)
    memjax.fit(RunConfig())
    quick, wiki, file, folder, given = asked
    assert quick == given == RunConfig()
    assert wiki.model.memory is not None
    assert (wiki.model.dim, wiki.model.memory.layers, wiki.data.path) == (32, (1,), "a b")
    assert (wiki.optim.lr, wiki.model.tie_embeddings) == (1e-3, True)
    assert (file.model.dim, file.model.memory) == (96, None)
    assert folder.model.dim == 96


def test_settings_may_be_paths(asked, tmp_path):
    parts = [{"name": "a", "path": tmp_path / "a b.txt"}]
    memjax.fit(None, {"run.dir": tmp_path, "data.source": "mixture", "data.mixture": parts})
    assert asked[0].run.dir == str(tmp_path)
    assert asked[0].data.mixture[0].path == f"{tmp_path}/a b.txt"


def test_wrong_settings_are_refused_as_on_the_command_line(asked):
    with pytest.raises(ConfigError, match=r"train\.stesp: unknown setting; did you mean 'train\.steps'"):
        memjax.fit("quickstart", {"train.stesp": 3})
    with pytest.raises(ValueError, match="change a RunConfig itself"):
        memjax.fit(RunConfig(), {"train.steps": 3})
    assert asked == []


@pytest.mark.parametrize(("code", "why"), [(5, "not a number"), (7, "too little memory"), (75, "a signal")])
def test_a_run_that_ends_early_raises(asked, code, why):
    with pytest.raises(RuntimeError, match=rf"runs/quickstart: the run ended early: .*{why}"):
        memjax.fit(None, {"train.steps": code})


def test_a_signal_before_there_is_anything_to_save_leaves_the_interpreter_alive(monkeypatch):
    monkeypatch.setattr(module, "train", lambda config, **_: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        memjax.fit()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_settings_that_come_before_jax_are_refused(asked, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(ConfigError, match=r"run\.deterministic=True must be known before JAX starts"):
        memjax.fit(None, {"run.deterministic": True})
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    memjax.fit(None, {"run.deterministic": True})
    settings = {"processes.count": 2, "processes.index": 0, "processes.coordinator": "localhost:1234"}
    with pytest.raises(ConfigError, match="several processes that train together"):
        memjax.fit(None, settings)
    assert len(asked) == 1
