"""Child processes that receive large arguments quickly, are shielded from signals, and end with this process."""

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
"""Signals that may be sent to a whole process group."""

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class LostError(Exception):
    """A child process has ended; the message gives its exit code and the likely cause."""


def handed(content: bytes) -> Connection:
    """A pipe through which a child process receives a pickled object; close it here once the process has started.

    Arguments of a process go through a pipe that holds 64 KiB: with larger ones, such as a tokenizer, starting a
    process blocks until it has imported what they need, so processes would start one after another. Here a thread
    blocks instead.
    """
    theirs, ours = multiprocessing.Pipe(duplex=False)

    def send() -> None:
        with contextlib.suppress(OSError), ours:  # the process has ended
            ours.send_bytes(content)

    threading.Thread(target=send, daemon=True).start()
    return theirs


@contextlib.contextmanager
def calls_in_processes(
    function: Callable[[Argument], Result], count: int
) -> Iterator[Callable[[Argument], "Future[Result]"]]:
    """Yields a function that submits calls of `function` to one of `count` processes, which end with the block.

    Each process has its own pipe and a thread in this process. No queue or lock is shared, so a process can be killed
    at any moment, and nothing has to be drained, released or waited for. Signals to the process group reach only this
    process. A call whose process has ended raises LostError.
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
    """How a child process has ended, and the likely cause."""
    process.join(1)
    code = process.exitcode
    if code == -signal.SIGKILL:
        why = "likely a lack of memory"
    elif code is not None and code < 0:
        why = "a crash of a library that it uses"
    else:
        why = (
            "it has printed why; a script must guard its entry point with `if __name__ == '__main__':`, because its "
            "processes import it"
        )
    return f"ended with exit code {code}; {why}"


def kill(running: list[tuple[BaseProcess, Connection]]) -> None:
    """Kills child processes, and removes them from the list."""
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
