"""`python -m memjax`: the commands by name."""

import pathlib
import re

import pytest

from memjax.__main__ import COMMANDS, main

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
    assert capsys.readouterr().err.startswith("python -m memjax: there is no command 'tarin'\n\nusage: ")
