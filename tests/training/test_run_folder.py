"""The folder of a run: what it records, and when it refuses to go on."""

import base64
import dataclasses
import json

import pytest

from memjax.config import ProcessesConfig, RunConfig, TrainConfig
from memjax.errors import ConfigError
from memjax.training.run_folder import RunFolder


@pytest.fixture
def claimed(tiny, tmp_path):
    """claim(settings): a run of those settings in one folder."""

    def claim(*settings: str, allow_changed: bool = False) -> RunFolder:
        folder = RunFolder.of(tiny.config(f"--run.dir {tmp_path}/run", *settings))
        folder.claim(tiny.config(f"--run.dir {tmp_path}/run", *settings), allow_changed=allow_changed)
        return folder

    return claim


def test_the_resolved_settings_and_the_environment_are_recorded(claimed):
    folder = claimed()
    assert "value_dim: 256" in (folder.path / "config.yaml").read_text()
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["versions"]["jax"]
    assert environment["devices"] == ["cpu"] * 8


def test_what_decides_what_is_learned_may_not_change(claimed):
    folder = claimed("--optim.lr 0.01")
    before = (folder.path / "config.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        claimed("--optim.lr 0.02", "--data.sequence_length 9", "--log.usage_every 7")
    first, *changes = caught.value.problems
    assert "holds a run with other settings" in first
    assert "--allow_changed" in first
    assert [line.split()[0].rstrip(":=") for line in sorted(changes)] == ["data.sequence_length", "optim.lr"]
    assert "0.01" in max(changes)
    assert "0.02" in max(changes)
    assert (folder.path / "config.yaml").read_text() == before, "a refused change must not be recorded"


@pytest.mark.parametrize(
    "settings",
    ["--mesh.data 2", "--checkpoint.every 7", "--eval.batches 3", "--log.usage_every 7", "--train.remat block"],
)
def test_where_and_how_it_runs_may_change(claimed, settings, capsys):
    claimed()
    claimed(settings)
    assert f"changed: {settings.split()[0][2:]}" in capsys.readouterr().out


def test_a_change_that_is_allowed_is_printed_and_recorded(claimed, capsys):
    claimed("--optim.lr 0.01")
    folder = claimed("--optim.lr 0.02", allow_changed=True)
    assert "changed: optim.lr" in capsys.readouterr().out
    assert "lr: 0.02" in (folder.path / "config.yaml").read_text()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("evals/1.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("evals/1.json", {"a": object()})
    assert json.loads((tmp_path / "evals/1.json").read_text()) == {"a": 1}
    assert folder.read_summary() is None
    folder.write_json("summary.json", {"steps": 3})
    assert folder.read_summary() == {"steps": 3}


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny, tmp_path):
    config = tiny.config(f"--run.dir {tmp_path} --data.tokenizer.kind bpe --model.vocab_size 300")
    folder = RunFolder.of(config)
    tokenizer = folder.tokenizer(config)
    assert 259 < tokenizer.vocab_size <= 300
    assert folder.tokenizer(config).fingerprint == tokenizer.fingerprint
    smaller = RunConfig(model=tiny.config().model, data=config.data, run=config.run)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=259 is less than the 300 tokens"):
        folder.tokenizer(smaller)


def test_a_run_keeps_a_copy_of_the_tokenizers_file(tiny, tmp_path):
    ranks = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "ranks").write_text(ranks)
    options = f"--data.tokenizer.kind tiktoken --data.tokenizer.path {tmp_path}/ranks"
    config = tiny.config(f"--run.dir {tmp_path}/run", *options.split())
    opened = RunFolder.of(config).tokenizer(config)
    (tmp_path / "ranks").unlink()
    kept = RunFolder.of(config).tokenizer(config)
    assert kept.fingerprint == opened.fingerprint
    assert kept.encode("a") == [97]
    assert (kept.bos_id, kept.eos_id, kept.vocab_size) == (256, 256, 257)


def test_a_process_that_is_not_the_first_reads_the_claim_and_writes_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"there for process 0, but not here; name a run\.dir that all machines share"
    ):
        folder.claim(RunConfig(), writes=False)
    assert not folder.path.exists()
    folder.claim(RunConfig())
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    other = dataclasses.replace(RunConfig(), processes=ProcessesConfig(index=1))
    folder.claim(other, writes=False)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        folder.claim(dataclasses.replace(other, train=TrainConfig(steps=7)), writes=False)
