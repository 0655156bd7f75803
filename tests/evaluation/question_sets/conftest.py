"""Runs a program in a thread, which tests talk to as if it were a process."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from memjax.evaluation.question_sets.program_wire import Channel, Peer


@contextlib.contextmanager
def served(program: str) -> Iterator[Channel]:
    """Serves a program while the block runs, and yields the channel to it."""
    (questions, asks), (answers, replies) = os.pipe(), os.pipe()
    names: dict[str, Any] = {"__name__": "__main__"}

    def run() -> None:
        with contextlib.suppress(SystemExit), os.fdopen(replies, "wb", closefd=True):
            exec(program, names)
            peer = Peer(Channel(questions, replies), may=lambda *_: True)
            peer.export(names)
            peer.serve()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Channel(answers, asks)
    finally:
        os.close(asks)
        thread.join()
        os.close(answers)
        os.close(questions)


@pytest.fixture(scope="session")
def serve():
    """The context manager `served`, since tests cannot import a conftest."""
    return served
