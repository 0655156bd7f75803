"""Console output: the logger `memjax`, and prints that survive a closed standard output.

Progress and warnings are records of `logging.getLogger("memjax")`. Commands show them (`log_to_console`) as plain lines
on standard output, and from level WARNING on standard error. Programs that use the library configure logging
themselves; as for any logger, only warnings show without a handler. A closed log pipe must not end a training run.
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
    """Shows the log on this process's output; idempotent, and keeps a log level that was set before."""
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())
        logger.propagate = False
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


class _Console(logging.Handler):
    """Writes to the current standard output or error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes only the record's message."""
        output(self.format(record), error=record.levelno >= logging.WARNING)


def output(text: str, *, error: bool = False) -> None:
    """Prints and flushes; the program continues if standard output is closed, full or cannot encode the text.

    Characters that the terminal cannot encode are replaced. After the first failure, standard output is redirected to
    the null device, so that neither later prints nor the interpreter's final flush fail.
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
    """Whether standard output is a terminal that shows the log and can rewrite a line."""
    return is_terminal() and os.environ.get("TERM") != "dumb" and logger.isEnabledFor(logging.INFO)


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def show_status(text: str) -> None:
    """Shows a status line at the bottom of the terminal, below all output; an empty one removes it.

    Does nothing without a terminal.
    """
    global _status
    if is_live():
        _status = text[: columns() - 1]
        _write(sys.stdout, _CLEAR + _status)


def columns() -> int:
    """Width of the terminal."""
    return shutil.get_terminal_size().columns


def fitted(text: str, indent: int = 2) -> str:
    """Wraps text to the terminal's width without breaking words; continuation lines are indented.

    For files and pipes, the text is unchanged.
    """
    if not is_terminal():
        return text
    layout = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    wrap = lambda line: textwrap.wrap(line, max(20, columns() - 1), **layout) or [line]
    return "\n".join(part for line in text.split("\n") for part in wrap(line))


def format_table(table: Sequence[Sequence[str]]) -> str:
    """Formats a table, names left-aligned and numbers right-aligned; transposed if the terminal is too narrow."""
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
    """Escapes control characters if standard output (or standard error) is a terminal.

    Text from models or files could otherwise move the cursor, change the title or inject input. Line feeds and tabs are
    kept; for files and pipes, the text is unchanged.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None or not stream.isatty():
        return text
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def open_missing_files() -> None:
    """Opens the null device for each standard stream that this process was started without.

    Otherwise the next opened files would get their descriptors, and output of libraries would go into them. Python sets
    the stream to None, and `print` with file=None writes to standard output.
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
    """Redirects standard output to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        # Buffered output is flushed into the null device at exit.
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
