"""Turns signals into a flag that the loop checks after every step; before there is anything to save, exits at once.

Does not import JAX, so that a program can call `run_program` before it does.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from memjax.io import closed_loops
from memjax.io.console import open_missing_files
from memjax.io.ctrl_c import leave, leave_after_output

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals with which schedulers, terminals and people end a program."""

_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
"""If these are ignored at the start, as under nohup or in the background of a script, they stay ignored."""

SAVED, NOTHING_SAVED, CHECKPOINT_TROUBLE = 75, 130, 4
"""Exit codes: the same command resumes from a checkpoint; there is no checkpoint; one could not be written or read."""

_TRACKER_THREAD = "memjax log."
"""Prefix of the names of tracker threads, which end with the run unless a service does not answer."""

_SAME_REQUEST_SECONDS = 2.0
"""Signals within this time count as one request, because launchers forward what a terminal also sends directly."""

_HANDLER_SECONDS = 0.5
"""How long Python's own handler has before the thread takes over, since no handler runs while JAX compiles."""


class Interrupt:
    """Whether a signal has asked the run to stop.

    While nothing would be lost (`at_once`), a signal ends the process. Otherwise it sets a flag, which the loop checks
    between steps; a later Ctrl-C, or a second SIGTERM, then ends the process without another save.
    """

    wakeup: int | None = None
    """File descriptor to which the interpreter writes the numbers of signals as they arrive."""

    def __init__(self, *, at_once: bool = True, quiet: bool = False) -> None:
        """Starts without a request; all processes but the first are `quiet`."""
        self.name: str | None = None
        """Name of the first signal; None so far."""
        self.exit_code = NOTHING_SAVED
        """Exit code if the process ends at once; SAVED once there is a checkpoint."""
        self._first: tuple[int, float] | None = None
        self.set(at_once=at_once, quiet=quiet)

    def set(self, *, at_once: bool, quiet: bool) -> None:
        """Replaces the arguments of `__init__`."""
        self._at_once, self._quiet = at_once, quiet

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. It does not print through Python's file objects, which it may have interrupted."""
        name, now = signal.Signals(number).name, time.monotonic()
        if self._at_once:
            self._end(name)
        if self._first is None:
            self._first, self.name = (number, now), name
            self._print(f"\n{name}: saving after this step")
        # SIGXCPU arrives every second, and schedulers warn with one signal before they send another.
        elif now - self._first[1] > _SAME_REQUEST_SECONDS and (
            number == signal.SIGINT or number == self._first[0] == signal.SIGTERM
        ):
            self._end(f"{name} again")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Leaves signals to the loop while the block runs. After it they end the process, unless an error ended it."""
        self._at_once = False
        yield
        self._at_once = True
        if self.name is not None:  # too late for the loop
            self.end()

    def rearm(self) -> None:
        """Sets the wake-up descriptor again, which the event loops of libraries leave unset."""
        if self.wakeup is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)

    def end(self) -> NoReturn:
        """Ends the process because of the signal that arrived."""
        self._end(self.name or "stopped")

    def _end(self, why: str) -> NoReturn:
        after = "the same command resumes from the latest checkpoint"
        if self.exit_code != SAVED:
            after = "ended before there was anything to save"
        self._print(f"\n{why}: {after}")
        leave(self.exit_code)

    def _print(self, line: str) -> None:
        if not self._quiet:
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode())

    def watch(self, number: int) -> None:
        """Ends the process if Python's handler cannot, because the main thread is in a long library call."""
        time.sleep(_HANDLER_SECONDS)
        if self._at_once:
            self._end(signal.Signals(number).name)


class RaisedInterrupt(Interrupt):
    """For library functions: raises KeyboardInterrupt instead of ending the process."""

    def _end(self, why: str) -> NoReturn:
        raise KeyboardInterrupt(why)

    def watch(self, number: int) -> None:
        """Leaves long library calls alone: only Python's own handler can raise in the main thread."""


@contextlib.contextmanager
def catch_interrupts(
    *, at_once: bool = True, quiet: bool = False, kind: type[Interrupt] = Interrupt
) -> Iterator[Interrupt]:
    """Handles the signals while the block runs; outside the main thread, where Python allows no handlers, does nothing.

    Inside another such block, the same `Interrupt` is used. The arguments are those of `Interrupt`; `kind` is the class
    that the outermost block instantiates.
    """
    outer = signal.getsignal(signal.SIGTERM)
    if isinstance(outer, Interrupt):
        outer.set(at_once=at_once, quiet=quiet)
        yield outer
        return
    interrupt = kind(at_once=at_once, quiet=quiet)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    here, there = socket.socketpair()
    there.setblocking(False)
    watcher = threading.Thread(target=_watch, args=[interrupt, here], name="memjax signals", daemon=True)
    watcher.start()
    caught = [n for n in SIGNALS if n not in _MAY_BE_IGNORED or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in caught}
    interrupt.wakeup = there.fileno()
    fd_before = signal.set_wakeup_fd(interrupt.wakeup, warn_on_full_buffer=False)
    try:
        yield interrupt
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:  # else the block has set it to be ignored for good
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        there.close()
        watcher.join()
        here.close()


def _watch(interrupt: Interrupt, numbers: socket.socket) -> None:
    while received := numbers.recv(1):
        if received[0] in SIGNALS:
            interrupt.watch(received[0])


def run_program(main: Callable[[], int]) -> NoReturn:
    """Runs the main function of a program and ends the process with its exit code.

    A signal before the program handles signals itself ends it with 130; one after it has returned does not change its
    exit code.
    """
    open_missing_files()
    closed_loops.hide()
    with catch_interrupts():
        code = main()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # Orbax's threads may wait for a save that failed, and exit handlers of a tracker's library for a service that
        # does not answer.
        stuck = any(thread.name.startswith(_TRACKER_THREAD) for thread in threading.enumerate())
        if stuck or code == CHECKPOINT_TROUBLE:
            leave_after_output(code)
        sys.exit(code)


def any_process_interrupted(interrupt: Interrupt, mesh: "Mesh") -> "Callable[[], jax.Array]":
    """A function that returns, as an array on the device, whether any of the processes has received a signal.

    All processes call it at the same points of the run and get the same answer. Reading it waits.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from memjax.sharding.rules import ONE_PER_DEVICE, REPLICATED

    reduce = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, REPLICATED))
    sharding = NamedSharding(mesh, ONE_PER_DEVICE)

    def ask() -> jax.Array:
        here = np.full(mesh.size, interrupt.name is not None)
        return reduce(jax.make_array_from_callback(here.shape, sharding, here.__getitem__))

    return ask
