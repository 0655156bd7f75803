"""Tracebacks that are not shown: TensorStore's threads report writes that failed to an event loop which the first of
them has ended.
"""

import sys
from types import TracebackType


def hide() -> None:
    """Leaves them out of what this process prints of errors that nothing has caught."""
    sys.excepthook = _excepthook
    sys.unraisablehook = unraisablehook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not _is_closed_loop(error):
        sys.__excepthook__(kind, error, trace)


def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
    """What `hide` makes of an error that could not be raised."""
    if not _is_closed_loop(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _is_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
