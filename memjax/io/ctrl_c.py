"""Handles Ctrl-C and SIGTERM in commands without state to save; `memjax.training.interrupt` is for training."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from memjax.io import closed_loops
from memjax.io.console import open_missing_files

_LOST_SECONDS = 2.0
"""Time after which an uncaught KeyboardInterrupt counts as lost."""
_CLEANING_SECONDS = 10.0
"""Time for clean-up after SIGTERM: a command may wait for processes that the same signal has ended."""
_due = math.inf
"""When that time is over; infinite before SIGTERM."""


class Terminated(KeyboardInterrupt):
    """The whole command must end, even where a Ctrl-C would stop only part of it."""


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs the main function of a command that signals may interrupt anywhere, and exits with its exit code.

    Ctrl-C, SIGTERM and SIGHUP become exceptions, so that no half-written files remain; a second SIGTERM ends the
    process at once. JAX callbacks and library imports may swallow a KeyboardInterrupt, so it is raised again until
    `heard` is called, except while one is being handled. Ignored signals, such as Ctrl-C in a script's background or
    SIGHUP under nohup, stay ignored.
    """
    open_missing_files()
    closed_loops.hide()
    sys.unraisablehook = _unraisable_but_for_ctrl_c
    signal.signal(signal.SIGALRM, _ctrl_c)
    for number, handler in _HANDLERS.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        code = main()
    except (KeyboardInterrupt, Exception) as error:
        # An import interrupted by Ctrl-C may fail with a different error.
        if isinstance(error, Exception) and signal.getitimer(signal.ITIMER_REAL) == (0, 0):
            raise
        heard()
        print("\ninterrupted", file=sys.stderr)
        code = 130
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    for number, handler in _HANDLERS.items():
        if signal.getsignal(number) is handler:
            signal.signal(number, signal.SIG_DFL)
    if code == 130:
        # A computation still running in a JAX thread would crash during interpreter shutdown.
        leave_after_output(code)
    sys.exit(code)


def leave_after_output(code: int) -> NoReturn:
    """Flushes the output, then ends the process like `leave`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process and its children at once, without waiting for threads; safe in a signal handler."""
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(code)


def heard() -> None:
    """Acknowledges a KeyboardInterrupt, so that it is not raised again."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _ctrl_c(number: int, frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_REAL, _LOST_SECONDS)
    if time.monotonic() > _due:
        leave_after_output(130)
    handled = sys.exception() if number == signal.SIGALRM else None
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return
        handled = handled.__context__
    raise KeyboardInterrupt if _due == math.inf else Terminated


def _terminate(number: int, frame: FrameType | None) -> None:
    global _due
    signal.signal(number, signal.SIG_DFL)
    _due = time.monotonic() + _CLEANING_SECONDS
    _ctrl_c(number, frame)


_HANDLERS = {signal.SIGINT: _ctrl_c, signal.SIGTERM: _terminate, signal.SIGHUP: _terminate}


def _unraisable_but_for_ctrl_c(unraisable: "sys.UnraisableHookArgs") -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        closed_loops.unraisablehook(unraisable)
