"""Lines for people on standard output, which may be gone: a log pipe that was closed must not end a training."""

import contextlib
import os
import re
import sys

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys: control characters and marks of writing direction; and surrogates, which have no bytes."""


def say(text: str = "", *, end: str = "\n") -> None:
    """Prints and flushes. When standard output is closed, full or cannot encode the text, the program goes on.

    Characters that the terminal cannot encode are replaced. After the first failure standard output is replaced by the
    null device, so that neither later prints nor the interpreter's last flush fail again.
    """
    stream = sys.stdout
    if stream is None:  # started without standard output
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding) + end)
        stream.flush()
    except (OSError, ValueError):  # ValueError: written to a closed file
        _discard_output()


def printable(text: str, *, error: bool = False) -> str:
    """Text for standard output, or standard error: for a terminal, with control characters spelled out.

    What a model or a file holds could otherwise move the cursor, change the title or answer in the user's place. Line
    feeds and tabs stay; files and pipes get the text as it is.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None or not stream.isatty():
        return text
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def warn(text: str) -> None:
    """Prints and flushes a line on standard error; when that is gone, the program goes on."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def _discard_output() -> None:
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        # What is buffered is flushed into the null device at exit.
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
