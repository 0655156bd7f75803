"""Hides tracebacks of TensorStore threads that report failed writes to an event loop closed by the first failure."""

import sys
import threading
from types import TracebackType


def hide() -> None:
    """Installs hooks that hide these tracebacks."""
    sys.excepthook = _excepthook
    sys.unraisablehook = unraisablehook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # In the main thread the error ends the program, which must say why.
    if threading.current_thread() is threading.main_thread() or not _is_closed_loop(error):
        sys.__excepthook__(kind, error, trace)


def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
    """The `sys.unraisablehook` that `hide` installs."""
    if not _is_closed_loop(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _is_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
