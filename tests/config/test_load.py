"""The grammar of config files and command lines; their errors are in test_load_errors.py."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from memjax.config.load import RUN_FOLDER, differences, load, parse, to_yaml
from memjax.config.memory import MemoryConfig
from memjax.config.run import RunConfig
from memjax.errors import ConfigError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(text: str, *overrides: str) -> RunConfig:
    Path("config.yaml").write_text(text)
    return load(RunConfig, Path("config.yaml"), overrides)


def test_numbers_are_those_of_yaml_1_2(here):
    config = loaded("optim:\n  lr: 3e-4\n  max_grad_norm: 1\ntrain: {steps: 128_000}\nrun: {dir: no}\n")
    assert (config.optim.lr, config.optim.max_grad_norm, config.train.steps, config.run.dir) == (
        3e-4,
        1.0,
        128_000,
        "no",
    )
    assert type(config.optim.max_grad_norm) is float


@pytest.mark.parametrize("word", ["yes", "2026-11-28", "12:30", "<<", "=", "-_", "01.02.03"])
def test_words_that_are_not_numbers_are_text(here, word):
    assert loaded(f"run: {{dir: {word}}}\n").run.dir == word


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--train.steps", "4"], "train.steps", 4),
        (["--train.steps=4"], "train.steps", 4),
        (["--data.batch-size", "6"], "data.batch_size", 6),
        (["--train.steps", "4", "--train.steps", "5"], "train.steps", 5),
        (["--checkpoint.no-verify"], "checkpoint.verify", False),
        (["--checkpoint.no_keep_best"], "checkpoint.keep_best", False),
        (["--run.deterministic"], "run.deterministic", True),
        (["--run.deterministic", "--train.steps", "4"], "run.deterministic", True),
        (["--checkpoint.verify", "false"], "checkpoint.verify", False),
        (["--checkpoint.verify", "Off"], "checkpoint.verify", False),
        (["--run.deterministic", "yes"], "run.deterministic", True),
        (["--train.steps", "1e3"], "train.steps", 1000),
        (["--optim.lr", "1e0"], "optim.lr", 1.0),
        (["--model.memory.layers", "0,2"], "model.memory.layers", (0, 2)),
        (["--model.memory.layers", "[0, 2]"], "model.memory.layers", (0, 2)),
        (["--model.memory.layers", "2"], "model.memory.layers", (2,)),
        (["--eval.questions", "a [1].jsonl, b: c.jsonl"], "eval.questions", ("a [1].jsonl", "b: c.jsonl")),
        (["--eval.questions", '["a,b.jsonl"]'], "eval.questions", ("a,b.jsonl",)),
        (["--eval.tasks", "2026"], "eval.tasks", ("2026",)),
        (["--eval.tasks", "\n"], "eval.tasks", ("\n",)),
        (["--optim.max_grad_norm", "none"], "optim.max_grad_norm", None),
        (["--optim.max_grad_norm", "null"], "optim.max_grad_norm", None),
        (["--model.memory.gate", "none"], "model.memory.gate", "none"),
        (["--optim.lr", "1e-4"], "optim.lr", 1e-4),
        (["--run.dir", "2026"], "run.dir", "2026"),
        (["--data.path=--odd"], "data.path", "--odd"),
        (["--model.memory", "null"], "model.memory", None),
        (["--model.memory", "{num_keys: 32}"], "model.memory", MemoryConfig(num_keys=32)),
    ],
)
def test_command_line_values(words, field, value):
    found = load(RunConfig, None, words)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_a_memory_section_over_a_dense_base_starts_from_the_defaults(here):
    Path("dense.yaml").write_text("model: {memory: null}\ntrain: {steps: 5}\n")
    config = loaded("extends: dense.yaml\nmodel:\n  memory: {num_keys: 30}\n")
    assert config.model.memory == MemoryConfig(num_keys=30)
    assert config.train.steps == 5
    assert load(RunConfig, Path("dense.yaml"), ["--model.memory.num_keys", "3000"]).model.memory == MemoryConfig(
        num_keys=3000
    )
    reset = loaded("model: {memory: {top_k: 3}}\n", "--model.memory", "null", "--model.memory.num_keys", "30")
    assert reset.model.memory == MemoryConfig(num_keys=30)


def test_a_file_extends_another_relative_to_itself(here):
    Path("sub").mkdir()
    Path("sub/one.yaml").write_text("extends: two.yaml\ntrain: {steps: 1}\n")
    Path("sub/two.yaml").write_text("train: {steps: 2, grad_accum_steps: 2}\n")
    config = loaded("extends: sub/one.yaml\n", "--run.seed", "7")
    assert (config.train.steps, config.train.grad_accum_steps, config.run.seed) == (1, 2, 7)


@pytest.mark.parametrize("name", ["wiki_text", "wiki_text.yaml"])
def test_a_file_extends_a_preset_by_its_name(here, name):
    Path("wiki_text").mkdir()  # a run folder of that name must not hide the preset
    config = loaded(f"extends: {name}\ntrain: {{steps: 2e3}}\n")
    assert (config.data.source, config.train.steps) == ("jsonl", 2000)


def test_a_value_from_the_command_line_is_blamed_on_it(here):
    with pytest.raises(ConfigError, match=r"^command line: model\.memory\.key_dim=5 must be positive and even"):
        loaded("model: {memory: {key_dim: 7}}\n", "--model.memory.key_dim", "5")


def test_differences_name_every_changed_field():
    old = load(RunConfig, None)
    new = load(RunConfig, None, ["--optim.lr", "1e-3", "--model.memory.layers", "0,2", "--optim.max_grad_norm", "null"])
    assert differences(old, new) == [
        "model.memory.layers: [1, 2] -> [0, 2]",
        "optim.lr: 0.006 -> 0.001",
        "optim.max_grad_norm: 1.0 -> null",
    ]
    (line,) = differences(load(RunConfig, None, ["--model.memory", "null"]), old)
    assert re.match(
        r"model\.memory: null -> \{layers: \[1, 2\], .*num_keys: 64, .*placement: 'replace', .*gate: 'silu'", line
    )
    assert differences(new, new) == []


def test_yaml_shows_every_field():
    lines = to_yaml(RunConfig()).splitlines()
    assert "    layers: [1, 2]" in lines
    assert "  max_grad_norm: 1.0" in lines


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to write."""

    prompt: str
    """The text to continue."""
    mode: Literal["greedy", "sample"] = "greedy"
    """How to choose tokens."""


def test_parse_gives_config_positional_and_flags():
    words = ["runs/a", "--prompt", "Once", "--dry-run", "--mode", "sample"]
    parsed = parse(Options, words, prog="go", description="Goes.", positional=RUN_FOLDER, flags={"dry_run": "Stop."})
    assert parsed.config == Options(prompt="Once", mode="sample")
    assert (parsed.positional, parsed.positionals, parsed.flags) == ("runs/a", ("runs/a",), {"dry_run"})


def test_parse_gives_all_positionals_where_there_may_be_several():
    several = dataclasses.replace(RUN_FOLDER, repeats=True)
    parsed = parse(Options, ["a", "--prompt", "Once", "b", "c"], prog="go", description="Goes.", positional=several)
    assert (parsed.positional, parsed.positionals) == ("a", ("a", "b", "c"))


def test_a_wrong_config_ends_the_training_at_once(here):
    Path("bad.yaml").write_text("model:\n  dmi: 8\n")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "memjax.train", "bad.yaml"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "bad.yaml:2: model.dmi: unknown setting; did you mean 'model.dim'?" in done.stderr
    assert done.stdout == ""
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "memjax.config.load" in imported
    assert not imported & {"jax", "numpy"}


def test_nothing_here_imports_jax():
    code = "import sys, memjax.config.load, memjax.config.run; sys.exit('jax' in sys.modules)"
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False, timeout=60).returncode == 0


def test_the_folder_of_a_run_stands_for_its_settings_and_its_place(here):
    def config(*words: str) -> RunConfig:
        return parse(RunConfig, words, prog="go", description="Goes.").config

    run = here / "moved to"
    run.mkdir()
    (run / "config.yaml").write_text("run: {dir: where/it/was, seed: 3}\noptim: {lr: 0.5}\n")
    found = config("moved to/", "--train.steps", "900")
    assert (found.run.dir, found.run.seed, found.optim.lr, found.train.steps) == ("moved to", 3, 0.5, 900)
    assert config("moved to", "--run.dir", "other").run.dir == "other"


def test_a_folder_without_settings_is_no_run_and_the_message_says_what_to_name(here, capsys):
    (here / "run/checkpoints").mkdir(parents=True)
    for word, hint in (("run", "--run.dir run to run there"), ("run/checkpoints", "name run")):
        if word != "run":
            (here / "run/config.yaml").write_text("")
        with pytest.raises(SystemExit):
            parse(RunConfig, [word], prog="go", description="Goes.")
        assert f"{word} is a folder without a config.yaml" in (shown := capsys.readouterr().err)
        assert hint in shown


@pytest.mark.parametrize("damage", ["", "\0\0", "# nothing\n", "run: [", "text"])
def test_damaged_settings_of_a_run_are_not_defaults_and_the_message_says_how_to_continue(here, capsys, damage):
    (here / "run/checkpoints").mkdir(parents=True)
    (here / "run/config.yaml").write_text(damage)
    with pytest.raises(SystemExit):
        parse(RunConfig, ["run"], prog="go", description="Goes.")
    shown = capsys.readouterr().err
    assert "run/config.yaml" in shown
    assert "give run its original settings again, and --run.dir run: they are compared with those" in shown
