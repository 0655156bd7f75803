"""Batches from worker processes that end with the program, however it ends.

Each worker builds every n-th batch and sends it through its own pipe. Nothing else is shared: no queue, no lock and no
shared memory, so a worker can be killed at any moment and nothing has to be drained, released or waited for.
"""

import contextlib
import fcntl
import multiprocessing
import multiprocessing.util
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import grain
from grain.experimental import ThreadPrefetchIterDataset

from memjax.errors import DataError
from memjax.io.children import SIGNALS, blocked, end_with_parent, ended, handed, kill, start_tracker

_AHEAD = 4
"""Batches that a worker prefetches beyond the one it is sending."""
_PIPE_BYTES = 1 << 20
"""The most that Linux allows an unprivileged user: fewer context switches per batch."""

State = dict[str, Any]


Shards = Callable[[int, int], grain.IterDataset]
"""Picklable: from a worker's index and the number of workers to its batches, every n-th of all."""


class _Message(NamedTuple):
    batch: Any
    state: State | None
    error: Exception | None = None


class Workers(Iterator[Any]):
    """Batches from n worker processes, one from each in turn; the processes start with the first batch."""

    def __init__(self, shards: Shards, count: int):
        self._shards = shards
        self._states: list[State] = [iter(shards(index, count)).get_state() for index in range(count)]
        self._next = 0
        self._running: list[tuple[BaseProcess, Connection]] = []
        self._closed = False
        # At exit, multiprocessing would terminate remaining processes and wait for them.
        self._finalize = multiprocessing.util.Finalize(self, kill, args=(self._running,), exitpriority=10)

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        if not self._running:
            self._start()
        process, pipe = self._running[self._next]
        try:
            batch, state, error = pipe.recv()
        except (EOFError, OSError) as lost:
            why = ended(process)
            self.close()
            advice = "data.num_workers lower, or 0, which shows where it crashes"
            raise DataError(f"data worker {self._next} {why}; set {advice}") from lost
        if error is not None:
            self.close()
            raise error
        self._states[self._next] = state
        self._next = (self._next + 1) % len(self._states)
        return batch

    def get_state(self) -> State:
        """The position after the last batch returned."""
        return {"next": self._next, "workers": list(self._states)}

    def set_state(self, state: State) -> None:
        """Continues from a position that `get_state` returned, or from one of Grain's own worker processes."""
        if "iterators_in_use_states" in state:
            state = {"next": state["next_index_in_cycle"], "workers": state["iterators_in_use_states"]}
        kill(self._running)
        self._next, self._states = state["next"], list(state["workers"])

    def close(self) -> None:
        """Ends the processes; there are no batches afterwards."""
        self._closed = True
        self._finalize()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        start_tracker()
        shards = pickle.dumps(self._shards)
        for index, state in enumerate(self._states):
            ours, theirs = context.Pipe(duplex=False)
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(theirs.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            given = handed(shards)
            args = (theirs, given, index, len(self._states), state)
            process = context.Process(target=_work, args=args, daemon=True, name=f"data-worker-{index}")
            # A signal to the process group asks the program to save and exit; its workers must survive it.
            with blocked(SIGNALS):
                process.start()
            theirs.close()
            given.close()
            self._running.append((process, ours))


def _work(pipe: Connection, shards: Connection, index: int, count: int, state: State) -> None:
    end_with_parent()
    try:
        batches = iter(ThreadPrefetchIterDataset(shards.recv()(index, count), prefetch_buffer_size=_AHEAD))
        batches.set_state(state)
        while True:
            batch = next(batches)
            pipe.send(_Message(batch, batches.get_state()))
    except BrokenPipeError:
        pass
    except Exception as error:
        if not isinstance(error, DataError):
            error.add_note(f"in data worker {index}:\n{traceback.format_exc()}")
        pipe.send(_Message(None, None, error))
    os._exit(0)  # the prefetching thread may be in the middle of a batch
