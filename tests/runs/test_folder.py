"""The folder of a run: what it records, and when it refuses to resume."""

import base64
import errno
import json
import os
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import pytest

from memjax.config.load import load, to_yaml
from memjax.config.run import RunConfig
from memjax.data.sources.kinds import find_source
from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from memjax.errors import ConfigError
from memjax.io.files import write_atomic
from memjax.models.parts import DecoderParts
from memjax.monitoring.metrics import Metrics
from memjax.monitoring.plots import plot_run
from memjax.runs import folder as folder_module
from memjax.runs.environment import command_line
from memjax.runs.folder import Claim, RunFolder
from memjax.runs.write import write_run

ROW = {"step": 1, "train/loss": 2.0}
RATES = ("--optim.lr 0.01", "--optim.lr 0.02")


@pytest.fixture
def started(tiny_config, tmp_path):
    """started(settings): starts a run in one folder and makes its first step, unless `fails`."""

    def start(*settings: str, allow_changed: bool = False, fails: bool = False) -> Claim:
        config = tiny_config(f"--run.dir {tmp_path}/run", *settings)
        claim = RunFolder.of(config).claim(config, allow_changed=allow_changed)
        if not fails:
            claim.record(7, ByteTokenizer())
            claim.folder.metrics.write_text(json.dumps(ROW) + "\n")
        return claim

    return start


@pytest.fixture
def finished(started):
    """A finished run of 6 steps with its summary."""
    folder = started("--train.steps 6").folder
    folder.write_json("summary.json", {"steps": 6, "metrics": {}})
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_resolved_settings_and_the_environment_are_recorded(started):
    folder = started().folder
    assert "value_dim: 256" in folder.config.read_text()
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["versions"]["jax"]
    assert environment["devices"] == ["cpu"] * 8
    assert environment["command"] == shlex.join(sys.orig_argv)
    assert isinstance(Tokenizer.load(folder.path), ByteTokenizer)


def test_the_console_script_is_recorded_as_it_was_typed(monkeypatch):
    words = ["train", "wiki_text", "--data.path", "my texts/*.jsonl"]
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python3.11", "/venv/bin/memjax", *words])
    assert command_line() == "memjax train wiki_text --data.path 'my texts/*.jsonl'"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "memjax", *words])
    assert shlex.split(command_line()) == ["python", "-m", "memjax", *words]


def test_settings_that_affect_learning_may_not_change(started):
    folder = started("--optim.lr 0.01").folder
    before = contents(folder.path)
    with pytest.raises(ConfigError) as caught:
        started("--optim.lr 0.02", "--data.sequence_length 9", "--log.usage_every 7")
    first, *changes = caught.value.problems
    assert "holds a run with other settings" in first
    assert "--allow_changed" in first
    assert f"python -m memjax.train {folder.path};" in first
    assert [line.split()[0].rstrip(":=") for line in sorted(changes)] == ["data.sequence_length", "optim.lr"]
    assert "0.01" in max(changes)
    assert "0.02" in max(changes)
    assert contents(folder.path) == before, "a refused change must not be recorded"


@pytest.mark.parametrize(
    "change",
    [
        "--data.tokenizer.kind byte",
        "--model.embedding_init_std 0.5",
        "--model.memory.value_init_scale 2",
        "--train.init_from elsewhere",
    ],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_settings_of_the_start_may_not_change_even_if_allowed(started, change, allowed):
    folder = started().folder
    (folder.checkpoints / "7").mkdir(parents=True)
    before = contents(folder.path)
    with pytest.raises(ConfigError) as caught:
        started(change, allow_changed=allowed)
    first, line = [*caught.value.problems]
    assert "only affect the beginning of a run; set them back, or name another --run.dir" in first
    assert line.strip().startswith(change.split()[0][2:] + ": ")
    assert contents(started().folder.path) == before


def test_settings_of_the_start_may_change_while_there_is_no_checkpoint(started):
    started()
    with pytest.raises(ConfigError, match="pass --allow_changed"):
        started("--data.tokenizer.kind byte")
    changes = started("--data.tokenizer.kind byte", allow_changed=True).changes
    assert [line.split(":")[0] for line in changes] == ["data.tokenizer.kind"]


@pytest.mark.parametrize(
    "settings",
    ["--mesh.data 2", "--checkpoint.every 7", "--eval.batches 3", "--log.usage_every 7", "--train.remat block"],
)
def test_where_and_how_it_runs_may_change(started, settings, capsys):
    started()
    started(settings)
    assert f"changed: {settings.split()[0][2:]}" in capsys.readouterr().out


def test_a_change_that_is_allowed_is_printed_and_kept_as_history(started, capsys):
    before, after = RATES
    started(before)
    folder = started(after, allow_changed=True).folder
    assert "changed: optim.lr" in capsys.readouterr().out
    assert "lr: 0.02" in folder.config.read_text()
    started(after)
    started(before, allow_changed=True)
    lines = [json.loads(line) for line in folder.config_history.read_text().splitlines()]
    assert [line["changes"] for line in lines] == [["optim.lr: 0.01 -> 0.02"], ["optim.lr: 0.02 -> 0.01"]]
    assert [line["step"] for line in lines] == [7, 7]


def test_a_start_without_a_step_claims_nothing(started, capsys):
    before, after = RATES
    folder = started(before, fails=True).folder
    assert not folder.path.exists()
    # As left by an older version, which wrote the settings first.
    write_atomic(folder.config, to_yaml(RunConfig()))
    folder.metrics.touch()
    started(after)
    assert "lr: 0.02" in folder.config.read_text()
    assert not folder.config_history.exists()
    started(before, allow_changed=True, fails=True)
    assert "lr: 0.02" in folder.config.read_text(), "no step was made with the allowed change"
    assert not folder.config_history.exists()


def test_a_finished_run_is_reported_and_never_rewritten(started, finished):
    before = contents(finished.path)
    steps = "--train.steps 6"
    assert started(steps, "--mesh.data 2", fails=True).finished["steps"] == 6
    for change in ("--optim.lr 0.5", "--eval.every 7", "--train.steps 5", "--log.usage_every 3"):
        with pytest.raises(ConfigError) as caught:
            started(steps, change, allow_changed=True)
        assert f"{finished.path} is finished with 6 steps" in str(caught.value)
        assert f"python -m memjax.train {finished.path} --train.steps N with N above 6" in str(caught.value)
        assert change.split()[0][2:] in str(caught.value)
    assert contents(finished.path) == before


def test_a_finished_run_is_continued_by_more_steps_alone(started, finished):
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        started("--train.steps 9", "--optim.lr 0.5")
    assert started("--train.steps 9", fails=True).finished is None
    assert finished.read_summary() == {"steps": 6, "metrics": {}}, "no step was made"
    started("--train.steps 9")
    assert finished.read_summary() is None
    assert json.loads((finished.path / "summary-6.json").read_text())["steps"] == 6
    assert "steps: 9" in finished.config.read_text()
    assert "train.steps: 6 -> 9" in finished.config_history.read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"steps": "6", "metrics": {}}', "[" * 100_000, "\ud800"])
def test_a_damaged_summary_is_no_finished_run(started, finished, text):
    finished.summary.write_bytes(text.encode(errors="surrogatepass"))
    assert started("--train.steps 6", fails=True).finished is None


@pytest.mark.parametrize("damage", [None, "", "\0" * 40, "run: [", "run: {dir: "])
def test_a_run_without_its_files_is_compared_with_its_checkpoint(tiny_config, tmp_path, capsys, damage):
    config = tiny_config(f"--run.dir {tmp_path}/run --model.memory null")
    parts = DecoderParts.of(config.model)
    model = parts.merge(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), parts.abstract_params), {})
    write_run(tmp_path / "run", model, ByteTokenizer(), config)
    folder = RunFolder.of(config)
    for file in (folder.config, folder.path / "tokenizer.json"):
        file.unlink()
        if damage is not None:
            file.write_text(damage)
    assert folder.claim(config).changes == ()
    assert isinstance(folder.saved_tokenizer(), ByteTokenizer)
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 8 -> 9"):
        folder.claim(tiny_config(f"--run.dir {tmp_path}/run --model.memory null --data.sequence_length 9"))
    warning = "using the settings in its newest checkpoint"
    assert (warning in capsys.readouterr().err) == (damage is not None)
    folder.claim(config).record(1, ByteTokenizer())
    assert load(RunConfig, folder.config) == config
    assert isinstance(Tokenizer.load(folder.path), ByteTokenizer)


def test_a_second_owner_is_refused_until_the_first_has_ended(tmp_path):
    folder = RunFolder(tmp_path / "runs/run")
    with folder.owned():
        refused = pytest.raises(ConfigError, match=rf"runs/run is in use: process {os.getpid()} on \S+ since 2")
        with refused, folder.owned():
            pass
        assert folder.path.exists()
    assert not (tmp_path / "runs").exists(), "folders that stayed empty are removed"
    with folder.owned():
        folder.write_json("kept.json", {})
    assert [path.name for path in folder.path.iterdir()] == ["kept.json"]


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    def refusal(path: pathlib.Path) -> str:
        with pytest.raises(ConfigError) as caught, RunFolder(path).owned():
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file = tmp_path / "file"
    file.touch()
    assert refusal(file) == f"run.dir={file} is a file; name a folder"
    assert f"run.dir={file}/below cannot be written (Not a directory: " in refusal(file / "below")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert f"run.dir={tmp_path}/new cannot be written (No space left on device)" in refusal(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_links_in_the_folder_lead_no_write_outside(started, tmp_path):
    outside, folder = tmp_path / "outside", RunFolder(tmp_path / "run")
    outside.mkdir()
    folder.path.mkdir()
    names = ("config.yaml", "environment.json", "config_history.jsonl", "tokenizer.json", "plots/loss.png")
    folder.plots.mkdir()
    for name in names:
        (outside / pathlib.Path(name).name).write_text("theirs")
        (folder.path / name).symlink_to(outside / pathlib.Path(name).name)
    started(RATES[0])
    started(RATES[1], allow_changed=True)
    plot_run(Metrics([ROW]), folder.plots)
    assert set(contents(outside).values()) == {b"theirs"}
    assert b"theirs" not in folder.config_history.read_bytes()
    (folder.path / "evals").symlink_to(outside)
    refused = pytest.raises(ConfigError, match=r"run/evals is a link to \S+outside, and a run writes only inside its")
    with refused, folder.owned():
        pass
    (folder.path / "evals").unlink()
    (folder.path / "evals").symlink_to(folder.plots)
    with folder.owned():
        pass


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_another_is_made_for_other_settings(tiny_config, tmp_path):
    def tokenizer(vocab_size: int, *settings: str) -> Tokenizer:
        few = "--data.biographies.num_people 20"
        config = tiny_config(f"--run.dir {tmp_path} --model.vocab_size {vocab_size} {few}", *settings)
        return RunFolder.of(config).tokenizer(config, find_source(config.data))

    bpe = "--data.tokenizer.kind bpe"
    first = tokenizer(300, bpe)
    assert 259 < first.vocab_size <= 300
    first.save(tmp_path)
    assert tokenizer(300, bpe).fingerprint == first.fingerprint
    assert tokenizer(280, bpe).vocab_size == 280, "no checkpoint needs the existing tokenizer"
    ranks = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "ranks").write_text(ranks)
    special = "--data.tokenizer.special_tokens a,b,c,d"
    tiktoken = f"--data.tokenizer.kind tiktoken --data.tokenizer.path {tmp_path}/ranks --data.tokenizer.eos a"
    with pytest.raises(ConfigError, match=r"model\.vocab_size=259 is less than the 260 tokens .*; raise it"):
        tokenizer(259, tiktoken, special)
    assert tokenizer(260, tiktoken, special).vocab_size == 260


def test_a_process_that_is_not_the_first_must_see_the_folder_of_the_first(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"exists for process 0, but not here; name a run\.dir that all machines share"
    ):
        folder.check_shared()
    assert not folder.path.exists()
    with folder.owned():
        folder.check_shared()


def test_a_process_that_is_not_the_first_records_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "is_first", lambda: False)
    folder = RunFolder(tmp_path / "run")
    folder.claim(RunConfig()).record(0, ByteTokenizer())
    assert not folder.path.exists()


def test_what_a_full_disk_refuses_is_recorded_by_the_next_step(started, monkeypatch):
    claim = started(fails=True)

    def refuse(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_atomic", refuse)
        with pytest.raises(OSError, match="No space"):
            claim.record(0, ByteTokenizer())
    claim.record(0, ByteTokenizer())
    assert claim.folder.config.exists()
    assert (claim.folder.path / "environment.json").exists()


def test_metrics_alone_claim_nothing(started):
    started().folder.config.unlink()
    assert started("--optim.lr 0.5", fails=True).before is None
