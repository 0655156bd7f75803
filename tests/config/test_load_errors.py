"""Error messages for wrong configs and command lines, word for word."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from memjax import generate, serve, train
from memjax.config.load import RUN_FOLDER, load, parse
from memjax.config.run import RunConfig
from memjax.errors import ConfigError

# kind -> (config.yaml, arguments after it, the only problem)
KINDS = {
    "unknown setting": (
        "optim:\n  wieght_decay: 0\n",
        [],
        "config.yaml:2: optim.wieght_decay: unknown setting; did you mean 'optim.weight_decay'?",
    ),
    "unknown setting that resembles nothing": ("", ["--zzz.yyy", "3"], "command line: zzz.yyy: unknown setting"),
    "unknown section": (
        "train: {steps: 9}\nmodle:\n  dim: 8\n",
        [],
        "config.yaml:2: modle: unknown setting; did you mean 'model'?",
    ),
    "wrong type": ("train:\n  steps: 1.5\n", [], "config.yaml:2: train.steps=1.5 must be a whole number"),
    "text for a number": ("model:\n  dim: '64'\n", [], "config.yaml:2: model.dim='64' must be a whole number"),
    "a number for a section": (
        "log: 3\n",
        [],
        "config.yaml:1: log=3 must be a section, with its settings on indented lines",
    ),
    "true for a section that may be null": (
        "",
        ["--log.wandb", "true"],
        "command line: log.wandb=true must be a section, with its settings on indented lines, or null",
    ),
    "null where there must be a value": (
        "",
        ["--model.dim", "null"],
        "command line: model.dim=null must be a whole number",
    ),
    "not a number": ("", ["--optim.lr", "nan"], "command line: optim.lr='nan' must be a number"),
    "out of range": ("eval:\n  every: 0\n", [], "config.yaml:2: eval.every=0 must be positive"),
    "below zero": ("", ["--optim.lr=-1"], "command line: optim.lr=-1.0 must not be negative"),
    "empty text": ("", ["--log.wandb.project", ""], "command line: log.wandb.project='' must not be empty"),
    "impossible shape": (
        "",
        ["--model.dim", "65"],
        "command line: model.num_heads=2 must divide dim=65 into heads of an even width, or head_dim be set",
    ),
    "shapes that do not fit each other": (
        "model:\n  memory:\n    num_keys: 4\n",
        [],
        "config.yaml:3: model.memory.top_k=8 must be in 1..num_keys=4: each half offers only num_keys candidates",
    ),
    "missing file": ("extends: bsae.yaml\n", [], "config.yaml:1: bsae.yaml does not exist; did you mean 'base.yaml'?"),
    "cyclic extends": (
        "extends: circle.yaml\n",
        [],
        "circle.yaml:1: extends forms a cycle: config.yaml -> circle.yaml -> config.yaml",
    ),
    "duplicate key": (
        "model: {dim: 8}\nmodel: {dim: 16}\n",
        [],
        "config.yaml:2: model: given twice; first at config.yaml:1",
    ),
    "brackets left open": (
        "model:\n  memory: {layers: [1\n",
        [],
        "config.yaml:3: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "indented too far": (
        "model:\n  dim: 8\n    num_layers: 3\n",
        [],
        "config.yaml:3: not valid YAML: mapping values are not allowed here; look at how far this line is indented, "
        "and put text with a colon in quotes",
    ),
    "tabs": (
        "model:\n\tdim: 8\n",
        [],
        "config.yaml:2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces, "
        "not with tabs",
    ),
    "two documents": (
        "run: {seed: 1}\n---\nrun: {seed: 2}\n",
        [],
        "config.yaml:2: not valid YAML: expected a single document in the stream, but found another document",
    ),
    "a name that is a list": ("? [1, 2]\n: 3\n", [], "config.yaml:1: a name must be a single word"),
    "a number for a flag": (
        "",
        ["--checkpoint.verify", "1"],
        "command line: checkpoint.verify=1 must be true or false",
    ),
    "two positionals": ("", ["other.yaml"], "command line: 'other.yaml' is an unexpected argument"),
    "bad list element": (
        "",
        ["--model.memory.layers", "0,x"],
        "command line: model.memory.layers[1]='x' must be a whole number",
    ),
    "a list that is no list": (
        "model:\n  memory:\n    layers: first\n",
        [],
        "config.yaml:3: model.memory.layers='first' must be a list, each item a whole number",
    ),
    "bad list": (
        "",
        ["--model.memory.layers", "2,1"],
        "command line: model.memory.layers=[2, 1] must be in rising order, each block once",
    ),
    "not one of the choices": (
        "data:\n  packing: first_fti\n",
        [],
        "config.yaml:2: data.packing='first_fti' must be one of 'none', 'concat', 'first_fit'; did you mean "
        "'first_fit'?",
    ),
    "missing value at the end": ("", ["--run.seed", "1", "--train.steps"], "command line: --train.steps needs a value"),
    "missing value before another": ("", ["--data.path", "--run.seed", "1"], "command line: --data.path needs a value"),
    "a value for a flag": ("", ["--dry_run=yes"], "command line: --dry_run takes no value"),
    "a misspelt flag": ("", ["--dryrun"], "command line: dryrun: unknown setting; did you mean 'dry_run'?"),
    "no for what is not yes or no": (
        "",
        ["--train.no-steps"],
        "command line: train.no_steps: unknown setting; did you mean 'train.steps'?",
    ),
}

# The path given instead of config.yaml -> the only problem.
FILES = {
    "confg.yaml": "command line: confg.yaml does not exist; did you mean 'config.yaml'?",
    "train.steps=4": "command line: train.steps=4 does not exist; for a setting write --train.steps=4",
    "folder": "command line: folder is a folder without a config.yaml, so not the folder of a run that has made a "
    "step; name a YAML file, and --run.dir folder to run there",
    "utf_16.yaml": "command line: utf_16.yaml is not UTF-8 text",
}

# name -> (config.yaml, command line, problems), with `base.yaml` in the same folder.
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
        "train: {steps: 1000.5}\noptim: 3\nrun:\n  dir: 2026\n  deterministic: yes\n",
        [],
        [
            "config.yaml:9: run.dir=2026 must be text, in quotes if it looks like a number",
            "config.yaml:10: run.deterministic='yes' must be true or false",
            "config.yaml:2: model.dim=true must be a whole number",
            "config.yaml:3: model.dtype='float23' must be one of 'auto', 'float32', 'bfloat16', 'float64'; "
            "did you mean 'float32'?",
            "config.yaml:5: model.memory.layers[1]='x' must be a whole number",
            "config.yaml:7: optim=3 must be a section, with its settings on indented lines",
            "config.yaml:6: train.steps=1000.5 must be a whole number",
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
        "train:\n  grad_accum_steps: 7\n",
        ["--mesh.memory", "2"],
        [
            "config.yaml:2: data.batch_size=32 must be a multiple of train.grad_accum_steps=7",
            "command line: mesh.memory=2 cannot split value_dim=64: each device needs a whole number of columns, "
            "at least 64; the largest that can is mesh.memory=1",
        ],
    ),
    "a tensor axis that divides nothing": (
        "model: {num_heads: 3, head_dim: 8, ffn_dim: 98, vocab_size: 2049}\nmesh: {tensor: 4}\n",
        [],
        [
            "config.yaml:2: mesh.tensor=4 must divide model.num_heads=3: each device takes an equal part; set "
            "model.num_heads=4, or mesh.tensor=1",
            "config.yaml:2: mesh.tensor=4 must divide model.vocab_size=2049: each device takes an equal part; set "
            "model.vocab_size=2052, or mesh.tensor=1",
            "config.yaml:2: mesh.tensor=4 must divide model.ffn_dim=98: each device takes an equal part; set "
            "model.ffn_dim=100, or mesh.tensor=1",
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
        ["--optim.lr", "--train.stepz=4", "--train.steps", "many", "--optim.max_grad_norm", "-1", "value"],
        [
            "command line: --optim.lr needs a value",
            "command line: train.stepz: unknown setting; did you mean 'train.steps'?",
            "command line: 'value' is not a setting; write --section.key value",
            "command line: optim.max_grad_norm=-1.0 must be positive",
            "command line: train.steps='many' must be a whole number",
        ],
    ),
    "a mistake in the base": (
        "extends: base.yaml\nmodel: {dim: 8}\n",
        [],
        ["base.yaml:2: train.grad_accum_step: unknown setting; did you mean 'train.grad_accum_steps'?"],
    ),
    "a circle": (
        "extends: ./config.yaml\n",
        [],
        ["config.yaml:1: extends forms a cycle: config.yaml -> config.yaml"],
    ),
    "a base that does not exist": (
        "extends: bse.yaml\n",
        [],
        ["config.yaml:1: bse.yaml does not exist; did you mean 'base.yaml'?"],
    ),
    "an extends that names no file": (
        "extends: [a, b]\n",
        [],
        ["config.yaml:1: extends must name one YAML file, .yaml or .yml, or a preset"],
    ),
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
    "a wrong part of a list": (
        "data:\n  source: mixture\n  mixture:\n    - {name: a, path: b, wieght: 2}\n    - {name: c, path: 3}\n",
        [],
        [
            "config.yaml:4: data.mixture[0].wieght: unknown setting; did you mean 'weight'?",
            "config.yaml:5: data.mixture[1].path=3 must be text, in quotes if it looks like a number",
        ],
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
    "a value that looks like an option": (
        "",
        ["--data.path", "--x"],
        [
            "command line: --data.path needs a value; one that begins with -- is given as --data.path=VALUE",
            "command line: x: unknown setting",
        ],
    ),
    "numbers that float32 and 64 bits cannot hold": (
        "optim:\n  lr: 1e99\n  eps: 1e-50\nrun: {seed: 1e30}\ntrain: {steps: 1e23}\n",
        [],
        [
            "config.yaml:4: run.seed=1000000000000000000000000000000 must be in -2**63..2**63-1",
            "config.yaml:2: optim.lr=1e+99 must be a number of float32: 0, or from 1.2e-38 to 3.4e38",
            "config.yaml:3: optim.eps=1e-50 must be a number of float32: 0, or from 1.2e-38 to 3.4e38",
            "config.yaml:5: train.steps=100000000000000000000000 must be in -2**63..2**63-1",
        ],
    ),
    "an item of a list": (
        "data:\n  source: mixture\n  mixture:\n  - {name: a, path: x, weight: .nan}\n"
        "  - {name: b, path: x, source: txt}\n",
        [],
        [
            "config.yaml:4: data.mixture[0].weight='.nan' must be a number",
            "config.yaml:5: data.mixture[1].source='txt' must be one of 'files', 'jsonl', 'text'; did you mean 'text'?",
        ],
    ),
    "YAML 1.1, where 017 is fifteen": (
        "%YAML 1.1\n---\ntrain: {steps: 017}\n",
        [],
        ["config.yaml:1: not valid YAML: this is read as YAML 1.2; remove the %YAML line"],
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
    Path("base.yaml").write_text("train:\n  grad_accum_step: 3\n")
    Path("circle.yaml").write_text("extends: config.yaml\n")
    Path("utf_16.yaml").write_bytes("model: null".encode("utf-16"))
    Path("folder").mkdir()
    return tmp_path


def refused(capsys, *words: str) -> list[str]:
    """Checks that the command line is refused with exit code 2, and returns the lines of the error."""
    with pytest.raises(SystemExit) as exit_:
        parse(RunConfig, words, prog="go", description="Goes.", flags={"dry_run": "Only print the sizes."})
    assert exit_.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    return error.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_one_problem_is_one_line(here, capsys, kind):
    text, words, problem = KINDS[kind]
    Path("config.yaml").write_text(text)
    assert refused(capsys, "config.yaml", *words) == ["go: 1 problem", f"  {problem}", "--help lists every setting."]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_line(here, capsys, name):
    Path("config.yaml").write_text("")
    assert refused(capsys, name) == ["go: 1 problem", f"  {FILES[name]}", "--help lists every setting."]


@pytest.mark.parametrize("name", WRONG)
def test_all_problems_are_reported_at_once_with_their_places(here, name):
    text, overrides, problems = WRONG[name]
    Path("config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(RunConfig, Path("config.yaml"), overrides)
    assert list(error.value.problems) == problems
    assert str(error.value) == "\n".join(problems)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to write."""

    prompt: str
    """The text to continue."""
    mode: Literal["greedy", "sample"] = "greedy"
    """How to choose tokens."""


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
        "  command line: prompt is missing: set --prompt",
        "--help lists every setting.",
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (generate, ["r", "--prompt", "--max-tokens", "5"]),
        (serve, ["r", "--host", "--no_warm_up"]),
        (train, ["quickstart", "--run.dir", "--dry-run"]),
    ],
)
def test_an_option_is_not_taken_for_a_missing_value(capsys, command, words):
    with pytest.raises(SystemExit):
        command.main(words)
    assert f"{words[1]} needs a value\n" in capsys.readouterr().err


def test_an_argument_that_is_not_a_path_is_not_called_missing(capsys):
    with pytest.raises(SystemExit):
        parse(Options, ["s3://bucket/run", "--prompt", "a"], prog="go", description="Goes.", positional=RUN_FOLDER)
    problem = "  command line: RUN=s3://bucket/run must be a path on this machine; "
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "go: 1 problem"
    assert error[1].startswith(problem)


# Misspelt setting (given the value 3) -> the suggestion.
TYPOS = {
    "optim.tabel.lr": "optim.table.lr",
    "optim.tables.optimizer": "optim.table.optimizer",
    "optim.beta": "optim.beta1",
    "optim.warmup": "optim.warmup_steps",
    "log.profil.steps": "log.profile.steps",
    "log.profile.stesp": "log.profile.steps",
    "log.wandbb.name": "log.wandb.name",
    "log.trackio.projct": "log.trackio.project",
    "model.memory.heads": "model.memory.num_heads",
    "model.memroy.num_keys": "model.memory.num_keys",
    "model.peeer.num_keys": "model.peer.num_keys",
    "model.expert.num_experts": "model.experts.num_experts",
    "model.moe.layers": "model.experts.layers",
    "model.layers": "model.num_layers",
    "model.vocabsize": "model.vocab_size",
    "data.tokeniser.kind": "data.tokenizer.kind",
    "data.seq_len": "data.sequence_length",
    "data.pth": "data.path",
    "data.biographys.seed": "data.biographies.seed",
    "data.tokenizer.vocab_size": "model.vocab_size",
    "trian.steps": "train.steps",
    "train.attn": "train.attention",
    "train.lr": "optim.lr",
    "checkpont.every": "checkpoint.every",
    "process.index": "processes.index",
    "mesh.memori": "mesh.memory",
    "stpes": "train.steps",
    "top_k": "model.memory.top_k",
    "lr": "optim.lr",
    "seed": "run.seed",
    "memory": "model.memory",
    "dryrun": "dry_run",
    "optim.momentum": None,
    "model.hidden_size": None,
    "zzz.yyy": None,
}


@pytest.mark.parametrize("typo", TYPOS)
def test_the_hint_is_the_intended_setting(capsys, typo):
    value = "{}" if typo == "memory" else "3"
    hint = f"; did you mean '{TYPOS[typo]}'?" if TYPOS[typo] else ""
    assert refused(capsys, f"--{typo}", value)[1] == f"  command line: {typo}: unknown setting{hint}"


def test_thousands_of_unknown_settings_are_counted_in_seconds(here, capsys):
    Path("config.yaml").write_text("optim:\n" + "".join(f"  lr_{number}: 0\n" for number in range(8_000)))
    start = time.process_time()
    lines = refused(capsys, "config.yaml")
    assert time.process_time() - start < 5  # about 1 s on an idle core
    assert lines[:2] == [
        "go: 8,000 problems",
        "  config.yaml:2: optim.lr_0: unknown setting; did you mean 'optim.lr'?",
    ]
    assert lines[-2:] == ["  and 7,960 more", "--help lists every setting."]
    assert len(lines) == 43


# name -> (config.yaml, arguments after it, how the only problem begins)
HOSTILE = {
    "lists in lists": (
        "run: {dir: " + "[" * 100 + "]" * 100 + "}",
        [],
        "config.yaml:1: run.dir: nested more than 32 lev",
    ),
    "more lists than Python's stack holds": (
        "run: " + "[" * 9000 + "]" * 9000,
        [],
        "config.yaml: is nested more than 32 levels deep",
    ),
    "lists in lists on the command line": ("", ["--data.mixture", "[" * 9000], "command line: data.mixture='[[["),
    "half a letter": ('run: {dir: "\\ud800"}', [], "config.yaml:1: run.dir='\\ud800' is not text in UTF-8"),
    "half a letter in a name": ('"a\\udfff": 1', [], "config.yaml:1: a\\udfff: unknown setting"),
    "a byte that is no UTF-8": ("", ["--run.dir", "a\udcff"], "command line: run.dir='a\\udcff' is not text in UTF-8"),
    "an escape sequence in a name": ('"\\e[31m": 1', [], "config.yaml:1: \\x1b[31m: unknown setting"),
    "an escape sequence in a value": (
        "",
        ["--processes.coordinator", "\x1b[31m"],
        "command line: processes.coordinator=\\x1b[31m must be HOST:PORT",
    ),
    "a base that is no config": (
        "extends: /etc/passwd",
        [],
        "config.yaml:1: extends must name one YAML file, .yaml or",
    ),
    "a megabyte of text": ("run: {seed: '" + "x" * 1_000_000 + "'}", [], "config.yaml:1: run.seed='xxx"),
    "more blocks than can be": (
        "model: {num_layers: 1000000000, experts: {}}",
        [],
        "config.yaml:1: model.num_layers=1",
    ),
    "more columns than can be": (
        "",
        ["--model.dim", "1000000000000", "--mesh.memory", "3"],
        "command line: mesh.memory=3 cannot split value_dim=1000000000000",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused_in_one_line(here, capsys, name):
    text, words, problem = HOSTILE[name]
    Path("config.yaml").write_text(text)
    start = time.process_time()
    lines = refused(capsys, "config.yaml", *words)
    assert time.process_time() - start < 5
    assert lines[1].startswith(f"  {problem}")
    assert max(map(len, lines)) < 500
    assert all(line.isprintable() for line in lines)


def test_an_impossible_file_name_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["n" * 300])
    printed = capsys.readouterr().err
    assert printed.startswith("python -m memjax.train: 1 problem")
    assert "File name too long" in printed


def test_characters_outside_the_locale_are_refused_with_the_way_out():
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    words = [sys.executable, "-m", "memjax.train", "--run.dir", "/tmp/ü"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "this locale is ascii: set PYTHONUTF8=1 for other characters" in done.stderr
    assert "Traceback" not in done.stderr
