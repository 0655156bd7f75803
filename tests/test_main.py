"""`python -m memjax COMMAND`."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import memjax
from memjax.__main__ import COMMANDS, main
from memjax.io.command import exit_code

PACKAGE = pathlib.Path(__file__).parents[1] / "memjax"


def test_every_command_is_listed(capsys):
    has_main = {path.stem for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert set(COMMANDS) == has_main - {"__main__"}
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        assert re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE) == list(COMMANDS)


def test_a_command_gets_the_words_after_its_name(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--trian.steps", "3"])
    assert ended.value.code == 2
    assert "trian.steps: unknown setting; did you mean 'train.steps'?" in capsys.readouterr().err


def test_an_unknown_command_ends_with_2(capsys):
    assert main(["tarin"]) == 2
    problem = "python -m memjax: there is no command 'tarin'; did you mean 'train'?\n\nusage: "
    assert capsys.readouterr().err.startswith(problem)


@pytest.mark.parametrize(("word", "command"), [("to-hf", "convert to-hf"), ("revert", "patch revert")])
def test_subcommands_are_found(word, command, capsys):
    assert main([word]) == 2
    assert f"there is no command {word!r}; did you mean {command!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("evaluate FILE", "is a file; name the folder of a run"),
        ("convert to-hf FILE --out new", "is a file; name the folder of a run"),
        ("convert from-hf FILE --out new", "is a file; name the folder of a downloaded model"),
        ("patch show FILE", "is not a patch, whose file ends in .safetensors"),
        ("plot FILE --out new.png", "is a file, where a folder is needed"),
        ("sweep --grid optim.lr=1e-3 --run.dir FILE/below", "is a file, where a folder is needed"),
    ],
)
def test_a_file_in_place_of_a_folder_is_named_as_such(words, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("# Notes")
    assert main([word.replace("FILE", "notes.md") for word in words.split()]) == 4
    assert re.search(rf"^\S*notes\.md:? {re.escape(problem)}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "option"), [("learn RUN FACTS", "--out"), ("convert upcycle RUN --out new", "--memory.layers")]
)
def test_a_missing_argument_is_named_as_its_option(words, option, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    assert f" is missing: set {option}\n" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memjax {memjax.__version__}\n"


def test_bash_completes_commands_and_their_settings(tmp_path, capsys):
    assert main(["--completion"]) == 0
    (tmp_path / "memjax").write_text(f'#!/bin/sh\nexec {sys.executable} -m memjax "$@"\n')
    (tmp_path / "memjax").chmod(0o755)
    ask = """
COMP_WORDS=(memjax gen); COMP_CWORD=1; _memjax; echo ${COMPREPLY[@]}
COMP_WORDS=(memjax plot --smo); COMP_CWORD=2; _memjax; echo ${COMPREPLY[@]}
COMP_WORDS=(memjax patch me); COMP_CWORD=2; _memjax; echo ${COMPREPLY[@]}
COMP_WORDS=(memjax patch merge --conf); COMP_CWORD=3; _memjax; echo ${COMPREPLY[@]}
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "-c", capsys.readouterr().out + ask], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["generate", "--smoothing", "merge", "--conflicts"]


def test_a_missing_platform_is_reported_in_one_line(monkeypatch, capsys):
    def devices():
        raise AssertionError  # as JAX does if it has a plugin but no device

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    assert exit_code(devices) == 2
    assert capsys.readouterr().err == (
        "JAX finds no device for JAX_PLATFORMS=cuda: set it to what this machine has (cpu always works), or unset it\n"
    )
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        exit_code(devices)
