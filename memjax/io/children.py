"""Child processes: what they are handed, the signals that they do not get, and their end with this process."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Those that may come to a whole process group."""

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class LostError(Exception):
    """A child process has ended; the text tells its exit code, and what that means."""


def handed(content: bytes) -> Connection:
    """A pipe through which a child process receives a pickled object; close it here after the start of the process.

    The arguments of a process go through a pipe that holds 64 KiB: with larger ones, such as a tokenizer, its start
    lasts until it has imported what they need, and many processes start one after another. Here a thread waits.
    """
    theirs, ours = multiprocessing.Pipe(duplex=False)

    def send() -> None:
        with contextlib.suppress(OSError), ours:  # of a process that has ended
            ours.send_bytes(content)

    threading.Thread(target=send, daemon=True).start()
    return theirs


@contextlib.contextmanager
def calls_in_processes(
    function: Callable[[Argument], Result], count: int
) -> Iterator[Callable[[Argument], "Future[Result]"]]:
    """Calls of a function in one of `count` processes, which end with the block.

    Each process has a pipe and a thread of this one, and nothing is shared, no queue and no lock: a process may be
    killed at any moment, and nothing has to be drained, released or waited for. Signals to the whole process group
    reach this process alone. A call whose process has ended raises LostError.
    """
    context, running = multiprocessing.get_context("spawn"), []
    pickled, idle = pickle.dumps(function), queue.SimpleQueue[tuple[BaseProcess, Connection]]()

    def call(argument: Argument) -> Result:
        process, pipe = mine = idle.get()
        try:
            pipe.send(argument)
            result, error = pipe.recv()
        except (EOFError, OSError) as lost:
            raise LostError(ended(process)) from lost
        finally:
            idle.put(mine)
        if error is not None:
            raise error
        return result

    threads = ThreadPoolExecutor(count)
    try:
        start_tracker()
        for _ in range(count):
            ours, theirs = context.Pipe()
            given = handed(pickled)
            process = context.Process(target=_answer_calls, args=(theirs, given), daemon=True)
            with blocked(SIGNALS):
                process.start()
                running.append((process, ours))
            theirs.close()
            given.close()
            idle.put((process, ours))
        yield partial(threads.submit, call)
    finally:
        for process, _ in running:
            process.kill()
        threads.shutdown(cancel_futures=True)
        kill(running)


def _answer_calls(pipe: Connection, given: Connection) -> None:
    end_with_parent()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        function = given.recv()
        while True:
            argument = pipe.recv()
            try:
                answer = function(argument), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)


def ended(process: BaseProcess) -> str:
    """How a child process has ended, and what that means."""
    process.join(1)
    code = process.exitcode
    if code == -signal.SIGKILL:
        why = "likely a lack of memory"
    elif code is not None and code < 0:
        why = "a crash of a library that it uses"
    else:
        why = (
            "it has printed why; what a script starts must stand below `if __name__ == '__main__':`, because its "
            "processes import it"
        )
    return f"ended with exit code {code}; {why}"


def kill(running: list[tuple[BaseProcess, Connection]]) -> None:
    """Ends child processes at once, and takes them out of the list."""
    for process, _ in running:
        process.kill()
    while running:
        process, pipe = running.pop()
        process.join()
        process.close()
        pipe.close()


def end_with_parent() -> None:
    """Ends this process as soon as its parent is gone, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_tracker() -> None:
    """Starts Python's resource tracker, before processes that inherit blocked signals: its start unblocks some.

    It ignores Ctrl-C and SIGTERM, but a closing terminal would end it, and its successor prints tracebacks.
    """
    with blocked(SIGNALS):
        resource_tracker.ensure_running()


@contextlib.contextmanager
def blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Blocks signals in this thread, and permanently in processes that it starts meanwhile.

    The system delivers a signal blocked here to another thread, after which Python runs its handler in the main
    thread; if this is the main thread, handlers run when the block ends.
    """
    came: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: handler for number in signals if callable(handler := signal.getsignal(number))}
            for number in handlers:
                signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in came:
            signal.raise_signal(number)
