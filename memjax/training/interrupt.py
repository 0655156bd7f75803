"""Turn signals into a flag that the loop checks after every step; before there is anything to save, exit at once.

Imports no JAX, so that a program can call `run_program` before it does.
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
"""Signals by which schedulers, terminals and people end a program."""

_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
"""Where these are ignored from the start, they stay so: under nohup, and in the background of a script."""

SAVED, NOTHING_SAVED, CHECKPOINT_TROUBLE = 75, 130, 4
"""Exit codes: the same command resumes from a checkpoint; there is none; one could not be written or read."""

_TRACKER_THREAD = "memjax log."
"""How the names of the trackers' threads begin, which end with the run unless a service does not answer."""

_SAME_REQUEST_SECONDS = 2.0
"""Launchers pass on what a terminal sends to all of them as well; copies within this time are one request."""

_HANDLER_SECONDS = 0.5
"""How long Python's own handler has before the thread takes over: none runs while JAX compiles."""


class Interrupt:
    """Whether a signal wants the run to stop.

    While nothing would be lost (`at_once`), a signal ends the process. Otherwise it is a flag, which the loop looks at
    between two steps; a later Ctrl-C, or a second SIGTERM, then ends the process without another save.
    """

    wakeup: int | None = None
    """Where the interpreter writes the numbers of signals as they come."""

    def __init__(self, *, at_once: bool = True, quiet: bool = False) -> None:
        """Starts without a request; `quiet` is for every process but the first."""
        self.name: str | None = None
        """The signal that came, None so far."""
        self.exit_code = NOTHING_SAVED
        """Exit code if the process ends at once; SAVED as soon as there is a checkpoint."""
        self._first: tuple[int, float] | None = None
        self.set(at_once=at_once, quiet=quiet)

    def set(self, *, at_once: bool, quiet: bool) -> None:
        """Changes what `__init__` was given."""
        self._at_once, self._quiet = at_once, quiet

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. It prints nothing through Python's files, which it may have interrupted."""
        name, now = signal.Signals(number).name, time.monotonic()
        if self._at_once:
            self._end(name)
        if self._first is None:
            self._first, self.name = (number, now), name
            self._print(f"\n{name}: saving after this step")
        # SIGXCPU comes every second, and schedulers warn with one signal before they send another.
        elif now - self._first[1] > _SAME_REQUEST_SECONDS and (
            number == signal.SIGINT or number == self._first[0] == signal.SIGTERM
        ):
            self._end(f"{name} again")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, signals wait for the loop. After it they end the process, unless an error ended it."""
        self._at_once = False
        yield
        self._at_once = True
        if self.name is not None:  # it came too late for the loop
            self.end()

    def rearm(self) -> None:
        """Takes back the wake-up descriptor, which event loops of libraries leave unset."""
        if self.wakeup is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)

    def end(self) -> NoReturn:
        """Ends the process for the signal that came."""
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
        """Ends the process where Python's handler cannot, because the main thread is in a long call of a library."""
        time.sleep(_HANDLER_SECONDS)
        if self._at_once:
            self._end(signal.Signals(number).name)


class RaisedInterrupt(Interrupt):
    """For functions that others call: what would end the process raises KeyboardInterrupt instead."""

    def _end(self, why: str) -> NoReturn:
        raise KeyboardInterrupt(why)

    def watch(self, number: int) -> None:
        """Leaves long calls of libraries alone: only Python's own handler can raise in the main thread."""


@contextlib.contextmanager
def catch_interrupts(
    *, at_once: bool = True, quiet: bool = False, kind: type[Interrupt] = Interrupt
) -> Iterator[Interrupt]:
    """Handles the signals while the block runs; outside of the main thread, where Python allows none, nothing changes.

    Inside another such block the same `Interrupt` is used. The arguments are those of `Interrupt`; `kind` is what the
    outermost block makes.
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
            if signal.getsignal(number) is interrupt:  # what the block has ignored for good stays ignored
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

    A signal that comes before the program catches its own ends it with 130; one that comes after it has returned does
    not change its code.
    """
    open_missing_files()
    closed_loops.hide()
    with catch_interrupts():
        code = main()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # Threads of Orbax may wait for a save that has failed, and what a tracker's library does at the exit for its
        # service, which does not answer.
        stuck = any(thread.name.startswith(_TRACKER_THREAD) for thread in threading.enumerate())
        if stuck or code == CHECKPOINT_TROUBLE:
            leave_after_output(code)
        sys.exit(code)


def any_process_interrupted(interrupt: Interrupt, mesh: "Mesh") -> "Callable[[], jax.Array]":
    """A function that returns, on the device, whether a signal has come to any of the processes.

    All processes call it at the same points of the run and get the same answers. Reading one waits for it.
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
