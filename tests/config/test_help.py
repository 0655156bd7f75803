"""--help lists every setting with its type, its default and its purpose."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memjax.config.load import RUN_FOLDER, parse
from memjax.config.run import RunConfig


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(RunConfig, ["-h"], prog="go", description="Goes.", flags={"dry_run": "Only print the sizes."})
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    for name, value in leaves(RunConfig(), ""):
        assert re.search(rf"  --{re.escape(name)}\s", shown)
        assert re.search(rf"--{re.escape(name)} (?:[^ ]+[|] )*[^ ]+ [A-Za-z*].*?\(default: ", flat), (
            f"{name}={value} is not explained"
        )
    assert "go [CONFIG.yaml]" in shown
    assert "--dry_run Only print the sizes." in flat
    assert "--model.memory.gate none|silu silu: Memory+" in flat
    assert "--model.memory null|{}" in shown
    assert "--log.wandb null|{} Also send the metrics" in flat
    assert "enables it with its defaults. (default: null)" in flat


def leaves(config, prefix):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def usage(capsys, **positional) -> str:
    with pytest.raises(SystemExit):
        parse(RunConfig, ["--help"], prog="go", description="Goes.", **positional)
    return capsys.readouterr().out.splitlines()[0]


def test_the_first_line_shows_positional_arguments(capsys):
    assert usage(capsys) == "usage: go [CONFIG.yaml] [--setting value ...]"
    assert usage(capsys, positional=None) == "usage: go [--setting value ...]"
    assert usage(capsys, positional=RUN_FOLDER) == "usage: go RUN [--setting value ...]"
    several = dataclasses.replace(RUN_FOLDER, repeats=True)
    assert usage(capsys, positional=several) == "usage: go RUN [RUN ...] [--setting value ...]"


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(RunConfig, ["--help", *words], prog="go", description="Goes.", examples=["go --run.dir runs/a"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_of_a_section_or_setting_is_that_alone(capsys):
    everything = help_of(capsys)
    assert "examples:\n  go --run.dir runs/a\n" in everything
    section = help_of(capsys, "optim.table")
    assert section.startswith("optim.table: The optimizer of the value tables")
    assert section in everything
    assert set(re.findall(r"^  --([\w.]+)\.", section, re.MULTILINE)) == {"optim.table"}
    assert "--data.tokenizer.kind" in help_of(capsys, "data")
    assert help_of(capsys, "log.wandb").startswith("  --log.wandb null|{}\n")
    assert help_of(capsys, "train.steps").startswith("  --train.steps INT\n      Number of optimizer steps.")
    assert "data.mixture[].weight NUMBER" in help_of(capsys, "data.mixture")


def test_help_for_an_unknown_name_is_refused_with_a_hint(capsys):
    for topic, hint in (("optin", "did you mean 'optim'?"), ("x.y", "sections: run, model, data, optim, mesh, ")):
        with pytest.raises(SystemExit) as exit_:
            parse(RunConfig, ["--help", topic], prog="go", description="Goes.")
        assert exit_.value.code == 2
        assert f"--help {topic}: there is no such section or setting; {hint}" in capsys.readouterr().err


def test_help_fits_a_narrow_terminal_except_for_names_and_survives_a_closed_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    shown = help_of(capsys, "data")
    assert all(len(line) <= 30 or line.startswith("  --") for line in shown.splitlines())
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-m", "memjax.train", "--help"]
    done = subprocess.run(words, env=env, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
