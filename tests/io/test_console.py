import io
import subprocess
import sys

import pytest

from memjax.io.console import fitted, printable

PROGRAM = """
import sys
from memjax.io.console import log_to_console, say
log_to_console()
for number in range(20000):
    say(f"line {number} \\u2014")
print("done", file=sys.stderr)
"""


def test_a_reader_that_leaves_ends_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("line 0")
    process.stdout.close()
    assert process.stderr.read() == "done\n"
    process.stderr.close()
    assert process.wait() == 0


def test_a_full_disk_ends_nothing() -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", PROGRAM], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (0, "done\n")


def test_characters_outside_the_terminals_encoding_are_replaced() -> None:
    program = "from memjax.io.console import output\noutput('caf\\u00e9 \\u2014')"
    environment = {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout == "caf? ?\n"


LIBRARY = """
import logging, sys
from memjax.io.console import log_to_console, say, warn
{setup}
say("100 % done")
warn("lost")
"""


@pytest.mark.parametrize(
    ("setup", "out", "error"),
    [
        ("log_to_console(), log_to_console()", "100 % done\n", "lost\n"),
        ("", "", "lost\n"),
        (
            "logging.basicConfig(level=1, stream=sys.stdout, format='%(name)s %(levelname)s %(funcName)s %(message)s')",
            "memjax INFO <module> 100 % done\nmemjax WARNING <module> lost\n",
            "",
        ),
        (
            "import orbax.checkpoint; logging.basicConfig(); logging.getLogger('memjax').setLevel('INFO')",
            "",
            "INFO:memjax:100 % done\nWARNING:memjax:lost\n",
        ),
        ("logging.getLogger('memjax').setLevel('WARNING'), log_to_console()", "", "lost\n"),
        ("logging.getLogger('memjax').addHandler(logging.NullHandler())", "", ""),
    ],
    ids=[
        "command",
        "library",
        "its own logging",
        "its own logging after Orbax",
        "silenced command",
        "silenced library",
    ],
)
def test_lines_are_those_of_the_logger_and_commands_alone_show_them_plainly(setup, out, error) -> None:
    program = LIBRARY.format(setup=setup)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (out, error)


def test_terminals_get_control_characters_spelled_out_and_files_get_the_text(monkeypatch) -> None:
    text = "a\x1b]0;title\x07\x9b2J\u202eb\tc\nd\ud800\x7f \u00e9\u4e2d"
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert printable(text, error=True) == text
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    shown = printable(text, error=True)
    assert shown == "a\\x1b]0;title\\x07\\x9b2J\\u202eb\tc\nd\\ud800\\x7f \u00e9\u4e2d"
    assert printable(shown, error=True) == shown
    assert printable(text) == text


def test_narrow_terminals_break_lines_between_words_and_files_get_the_text(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    text = "a line  that is longer than-that\n\nshort\n" + 30 * "x"
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert fitted(text) == text
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert fitted(text, 4) == "a line  that is longer\n    than-that\n\nshort\n" + 30 * "x"
