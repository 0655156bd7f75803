"""Console output: the logger `memjax`, and prints that survive a closed standard output.

How far a work is, and what goes wrong without ending it, are records of `logging.getLogger("memjax")`. Commands show
them (`log_to_console`): plain lines on standard output, from warnings on standard error. Programs that use the library
decide themselves: without a handler of theirs only warnings show, as of every logger. A log pipe that was closed must
not end a training.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("memjax")

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, directional marks and surrogates, which must not reach a terminal."""


def say(text: str) -> None:
    """Logs a line of progress."""
    logger.info("%s", text, stacklevel=2)


def warn(text: str) -> None:
    """Logs a warning."""
    logger.warning("%s", text, stacklevel=2)


def log_to_console() -> None:
    """Shows the log on this process's output; only the first call does anything. A level that is set already stays."""
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())
        logger.propagate = False
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


class _Console(logging.Handler):
    """Writes to what is standard output or error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record's message alone."""
        output(self.format(record), error=record.levelno >= logging.WARNING)


def output(text: str, *, error: bool = False) -> None:
    """Prints and flushes. When standard output is closed, full or cannot encode the text, the program continues.

    Characters that the terminal cannot encode are replaced. After the first failure standard output is replaced by the
    null device, so that neither later prints nor the interpreter's last flush fail again.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # started without it
        return
    status = _status if is_live() else ""
    if status:
        _write(sys.stdout, _CLEAR)
    _write(stream, text + "\n", error=error)
    if status:
        _write(sys.stdout, status)


def _write(stream: Any, text: str, *, error: bool = False) -> None:
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace" if error else "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # ValueError: written to a closed file
        if not error:
            discard_output()


_CLEAR = "\r\x1b[K"
_status = ""
"""The status line at the bottom of the terminal."""


def is_live() -> bool:
    """Whether standard output is a terminal that shows the log, on which a line can change."""
    return is_terminal() and os.environ.get("TERM") != "dumb" and logger.isEnabledFor(logging.INFO)


def is_terminal() -> bool:
    """Whether standard output is one."""
    return sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def show_status(text: str) -> None:
    """Shows a line at the bottom of the terminal, below all that is printed; an empty one takes it away.

    Without a terminal nothing is shown.
    """
    global _status
    if is_live():
        _status = text[: columns() - 1]
        _write(sys.stdout, _CLEAR + _status)


def columns() -> int:
    """Width of the terminal."""
    return shutil.get_terminal_size().columns


def fitted(text: str, indent: int = 2) -> str:
    """Text whose lines a terminal shows without breaking words; what continues a line is indented.

    Files and pipes get the text as it is.
    """
    if not is_terminal():
        return text
    layout = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    wrap = lambda line: textwrap.wrap(line, max(20, columns() - 1), **layout) or [line]
    return "\n".join(part for line in text.split("\n") for part in wrap(line))


def format_table(table: Sequence[Sequence[str]]) -> str:
    """The table as text, names to the left and numbers to the right; turned over where a terminal is too narrow."""
    lines = _aligned(table)
    return "\n".join(
        lines if not is_terminal() or len(lines[0]) < columns() else _aligned(list(zip(*table, strict=True)))
    )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *numbers in table:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return lines


def printable(text: str, *, error: bool = False) -> str:
    """Text for standard output, or standard error: for a terminal, with control characters spelled out.

    What a model or a file holds could otherwise move the cursor, change the title or answer in the user's place. Line
    feeds and tabs stay; files and pipes get the text as it is.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None or not stream.isatty():
        return text
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def open_missing_files() -> None:
    """Opens the null device as standard input, output and error, where this process was started without them.

    The next files that are opened would get their numbers, and what libraries print would go into these. Python has
    None for such a file, and prints to standard output what is printed to None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  stays open


def discard_output() -> None:
    """Sends what is still written to standard output nowhere."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        # What is buffered is flushed into the null device at exit.
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
