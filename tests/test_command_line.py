"""What a person sees when a config is wrong, word for word, and the grammar of files and command lines."""

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from memjax.command_line import RUN_FOLDER, ConfigError, differences, load, parse, to_yaml
from memjax.config import MemoryConfig, RunConfig

# name -> (config.yaml, command line, problems); `base.yaml` lies beside it.
WRONG = {
    "a misspelt setting": (
        "model:\n  memory:\n    num_kyes: 32\n",
        [],
        ["config.yaml:3: model.memory.num_kyes: unknown setting; did you mean 'model.memory.num_keys'?"],
    ),
    "a setting in the wrong section": (
        "model:\n  num_keys: 32\nsteps: 4\nmemory: {top_k: 1}\n",
        [],
        [
            "config.yaml:2: model.num_keys: unknown setting; did you mean 'model.memory.num_keys'?",
            "config.yaml:3: steps: unknown setting; did you mean 'train.steps'?",
            "config.yaml:4: memory: unknown setting; did you mean 'model.memory'?",
        ],
    ),
    "wrong types": (
        "model:\n  dim: true\n  dtype: float23\n  memory:\n    layers: [1, x]\n"
        "train: {steps: 1e3}\noptim: 3\nrun:\n  dir: 2026\n  deterministic: yes\n",
        [],
        [
            "config.yaml:9: run.dir=2026 must be text, in quotes if it looks like a number",
            "config.yaml:10: run.deterministic='yes' must be true or false",
            "config.yaml:2: model.dim=true must be a whole number",
            "config.yaml:3: model.dtype='float23' must be one of 'auto', 'float32', 'bfloat16', 'float64'; "
            "did you mean 'float32'?",
            "config.yaml:5: model.memory.layers[1]='x' must be a whole number",
            "config.yaml:7: optim=3 must be a section, with its settings on indented lines",
            "config.yaml:6: train.steps=1000.0 must be a whole number",
        ],
    ),
    "a wrong part of a list": (
        "data:\n  source: mixture\n  mixture:\n    - {name: a, path: b, wieght: 2}\n    - {name: c, path: 3}\n",
        [],
        [
            "config.yaml:4: data.mixture[0].wieght: unknown setting; did you mean 'weight'?",
            "config.yaml:5: data.mixture[1].path: Input should be a valid string",
        ],
    ),
    "impossible sizes": (
        "model:\n  memory:\n    top_k: 100\n    key_dim: 3\noptim:\n  beta2: 1.0\n",
        [],
        [
            "config.yaml:3: model.memory.top_k=100 must be in 1..num_keys=64: "
            "each half offers only num_keys candidates",
            "config.yaml:4: model.memory.key_dim=3 must be positive and even: it is split into two halves",
            "config.yaml:6: optim.beta2=1.0 must be in 0..1 and below 1",
        ],
    ),
    "sections that do not fit each other": (
        "train:\n  accumulate: 7\n",
        ["--mesh.memory", "2"],
        [
            "config.yaml:2: data.batch_size=32 must be a multiple of train.accumulate=7",
            "command line: mesh.memory=2 cannot split value_dim=64: each device needs a whole number of columns, "
            "at least 64; the largest that can is mesh.memory=1",
        ],
    ),
    "a layer that does not exist": (
        "model: {num_layers: 1}\n",
        [],
        ["config.yaml:1: model.memory.layers=[1, 2] must lie in 0..0: the model has num_layers=1 blocks"],
    ),
    "one name twice": (
        "model:\n  dim: 64\n  dim: 128\n",
        [],
        ["config.yaml:3: model.dim: given twice; first at config.yaml:2"],
    ),
    "mistakes on the command line": (
        "",
        ["--optim.lr", "--train.stepz=4", "--train.steps", "many", "--optim.clip", "-1", "value"],
        [
            "command line: --optim.lr needs a value",
            "command line: train.stepz: unknown setting; did you mean 'train.steps'?",
            "command line: 'value' is not a setting; write --section.key value",
            "command line: optim.clip=-1.0 must be positive",
            "command line: train.steps='many' must be a whole number",
        ],
    ),
    "a mistake in the base": (
        "extends: base.yaml\nmodel: {dim: 8}\n",
        [],
        ["base.yaml:2: train.accumulat: unknown setting; did you mean 'train.accumulate'?"],
    ),
    "a circle": (
        "extends: ./config.yaml\n",
        [],
        ["config.yaml:1: extends goes round in a circle: config.yaml -> config.yaml"],
    ),
    "a base that does not exist": (
        "extends: bse.yaml\n",
        [],
        ["config.yaml:1: bse.yaml does not exist; did you mean 'base.yaml'?"],
    ),
    "an extends that names no file": ("extends: [a, b]\n", [], ["config.yaml:1: extends must name one YAML file"]),
    "dots in a file": (
        "model.dim: 8\n",
        [],
        ["config.yaml:1: model.dim: write sections as indented lines, not with dots"],
    ),
    "no sections": (
        "- a\n",
        [],
        ["config.yaml:1: a config consists of sections, `name:` with indented lines below it"],
    ),
    "broken YAML": (
        "model: [1,\ntrain: 3\n",
        [],
        ["config.yaml:3: not valid YAML: expected ',' or ']', but got '<stream end>'"],
    ),
    "more YAML than is wanted": (
        "run: !!python/object/apply:os.system [ls]\n",
        [],
        [
            "config.yaml:1: not valid YAML: tags (!) and anchors (&, *) are not allowed; "
            "quote the text, or use `extends:`"
        ],
    ),
    "numbers that overflow": (
        f"optim: {{lr: 1e999}}\ntrain: {{steps: {'9' * 50}}}\n",
        [],
        [
            "config.yaml:1: optim.lr='1e999' must be a number",
            f"config.yaml:2: train.steps='{'9' * 50}' must be a whole number",
        ],
    ),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("train:\n  accumulat: 3\n")
    return tmp_path


def loaded(text: str, *overrides: str) -> RunConfig:
    Path("config.yaml").write_text(text)
    return load(RunConfig, Path("config.yaml"), overrides)


@pytest.mark.parametrize("name", WRONG)
def test_every_problem_is_told_at_once_with_its_place(here, name):
    text, overrides, problems = WRONG[name]
    with pytest.raises(ConfigError) as error:
        loaded(text, *overrides)
    assert list(error.value.problems) == problems
    assert str(error.value) == "\n".join(problems)


def test_numbers_are_those_of_yaml_1_2(here):
    config = loaded("optim:\n  lr: 3e-4\n  clip: 1\ntrain: {steps: 128_000}\nrun: {dir: no}\n")
    assert (config.optim.lr, config.optim.clip, config.train.steps, config.run.dir) == (3e-4, 1.0, 128_000, "no")
    assert type(config.optim.clip) is float


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
        (["--model.memory.layers", "0,2"], "model.memory.layers", (0, 2)),
        (["--model.memory.layers", "[0, 2]"], "model.memory.layers", (0, 2)),
        (["--model.memory.layers", "2"], "model.memory.layers", (2,)),
        (["--optim.clip", "none"], "optim.clip", None),
        (["--optim.clip", "null"], "optim.clip", None),
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
    Path("sub/two.yaml").write_text("train: {steps: 2, accumulate: 2}\n")
    config = loaded("extends: sub/one.yaml\n", "--run.seed", "7")
    assert (config.train.steps, config.train.accumulate, config.run.seed) == (1, 2, 7)


def test_a_value_from_the_command_line_is_blamed_on_it(here):
    with pytest.raises(ConfigError, match=r"^command line: model\.memory\.key_dim=5 must be positive and even"):
        loaded("model: {memory: {key_dim: 7}}\n", "--model.memory.key_dim", "5")


def test_differences_name_every_changed_field():
    old = load(RunConfig, None)
    new = load(RunConfig, None, ["--optim.lr", "1e-3", "--model.memory.layers", "0,2", "--optim.clip", "null"])
    assert differences(old, new) == [
        "model.memory.layers: [1, 2] -> [0, 2]",
        "optim.lr: 0.006 -> 0.001",
        "optim.clip: 1.0 -> null",
    ]
    (line,) = differences(load(RunConfig, None, ["--model.memory", "null"]), old)
    assert re.match(r"model\.memory: null -> \{layers: \[1, 2\], num_keys: 64, .*gate: 'silu'", line)
    assert differences(new, new) == []


def test_yaml_shows_every_field():
    lines = to_yaml(RunConfig()).splitlines()
    assert "    layers: [1, 2]" in lines
    assert "  clip: 1.0" in lines


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to write."""

    prompt: str
    """The text to go on from."""
    mode: Literal["greedy", "sample"] = "greedy"
    """How to pick."""


def test_parse_gives_config_positional_and_flags():
    words = ["runs/a", "--prompt", "Once", "--dry-run", "--mode", "sample"]
    parsed = parse(Options, words, prog="go", description="Goes.", positional=RUN_FOLDER, flags={"dry_run": "Stop."})
    assert parsed.config == Options(prompt="Once", mode="sample")
    assert (parsed.positional, parsed.flags) == ("runs/a", {"dry_run"})


def test_parse_prints_one_screen_and_exits_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(Options, ["--mdoe", "x", "--dry"], prog="go", description="Goes.", positional=RUN_FOLDER)
    assert exit_.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.splitlines() == [
        "go: 4 problems",
        "  command line: mdoe: unknown setting; did you mean 'mode'?",
        "  command line: dry: unknown setting",
        "  command line: RUN is missing: The folder of a run.",
        "  command line: prompt is missing: it must be text, in quotes if it looks like a number",
        "--help lists every setting.",
    ]


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(RunConfig, ["-h"], prog="go", description="Goes.", flags={"dry_run": "Only print the sizes."})
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    for name, value in leaves(RunConfig(), ""):
        assert f"  --{name} " in shown
        assert re.search(rf"--{re.escape(name)} [^ ]+ [A-Za-z*].*?\(default: ", flat), (
            f"{name}={value} is not explained"
        )
    assert "go [CONFIG.yaml]" in shown
    assert "--dry_run Only print the sizes." in flat
    assert "--model.memory.gate none|silu silu: Memory+" in flat
    assert "--model.memory null" in shown


def leaves(config, prefix):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def test_a_wrong_config_ends_the_training_at_once(here):
    Path("bad.yaml").write_text("model:\n  dmi: 8\n")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "memjax.train", "bad.yaml"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
        check=False,
    )
    assert time.monotonic() - start < 3
    assert done.returncode == 2
    assert "bad.yaml:2: model.dmi: unknown setting; did you mean 'model.dim'?" in done.stderr
    assert done.stdout == ""


def test_nothing_here_imports_jax():
    code = "import sys, memjax.command_line, memjax.config; sys.exit('jax' in sys.modules)"
    env = {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False, timeout=60).returncode == 0
