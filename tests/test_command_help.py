"""What --help says: every setting, its type, its default and what it is for."""

import dataclasses
import re

import pytest

from memjax.command_line import RUN_FOLDER, parse
from memjax.config import RunConfig


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
    assert "--model.memory null|{}" in shown
    assert "--log.wandb null|{} Send the metrics" in flat
    assert "switches it on with its defaults. (default: null)" in flat


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


def test_the_first_line_tells_what_stands_without_a_name(capsys):
    assert usage(capsys) == "usage: go [CONFIG.yaml] [--setting value ...]"
    assert usage(capsys, positional=None) == "usage: go [--setting value ...]"
    assert usage(capsys, positional=RUN_FOLDER) == "usage: go RUN [--setting value ...]"
    several = dataclasses.replace(RUN_FOLDER, repeats=True)
    assert usage(capsys, positional=several) == "usage: go RUN [RUN ...] [--setting value ...]"
