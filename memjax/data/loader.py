"""The training batches of a run: reshuffled every epoch, endless, and resumed exactly.

Every process of a run reads all the data and gives its devices their rows, so the order of the data depends neither on
the mesh nor on the number of processes, and a position means the same to all of them.
"""

import json
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import grain
from grain.experimental import ThreadPrefetchIterDataset

from memjax.data.dataset import Dataset
from memjax.data.packing import Batch
from memjax.data.workers import Workers
from memjax.errors import DataError
from memjax.io.console import say

_READY_BATCHES = 4


class TrainingData(Iterator[Batch]):
    """An endless iterator over batches, whose position can be saved and restored.

    The same arguments give the same batches. Batches are prefetched by a thread, or by `config.num_workers` processes;
    a program that uses workers must guard its entry point with `if __name__ == "__main__"`.
    """

    def __init__(self, dataset: Dataset, *, seed: int):
        """Threads and processes start with the first batch."""
        config, splits = dataset.config, dataset.train
        self._plan = {
            "num_workers": config.num_workers,
            "tokenizer": dataset.tokenizer.fingerprint,
            "seed": seed,
            "source": config.source,
            "num_records": sum(split.stop for split in splits),
            "packing": config.packing,
            "sequence_length": config.sequence_length,
            "batch_size": config.batch_size,
            "shuffle": config.shuffle,
        }
        if config.source == "mixture":
            self._plan["mixture"] = [
                {"name": part.name, "weight": part.weight, "num_records": split.stop}
                for part, split in zip(config.mixture, splits, strict=True)
            ]
        self._data = [split.reader.fingerprint() for split in splits]
        stop = threading.Event()
        batches: Any
        if config.num_workers:
            batches = Workers(partial(_shard, dataset, seed), config.num_workers)
        else:
            ahead = dataset.train_batches(seed, stop=stop)
            batches = iter(ThreadPrefetchIterDataset(ahead, prefetch_buffer_size=_READY_BATCHES))
        self._open = [batches]
        # A thread or process that is still reading at interpreter shutdown would abort it with a different exit code,
        # so iterators left open are closed and released before.
        self._close = weakref.finalize(self, _close_all, self._open, stop)

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        return next(self._open[0])

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned, as JSON values; must not be called after `close`."""
        position = json.loads(json.dumps(self._open[0].get_state()))
        return {"plan": dict(self._plan), "data": self._data, "grain": position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` returned. Those before 0.2 lack the fingerprint of the data.

        Raises:
            DataError: the position belongs to other data, another tokenizer or other settings.
        """
        saved = state["plan"]
        changed = [
            f"{name}={now!r} here, {saved.get(name)!r} in the checkpoint"
            for name, now in self._plan.items()
            if saved.get(name) != now
        ]
        if not changed:
            for before, now in zip(state.get("data", self._data), self._data, strict=True):
                changed += _differences(before, now)
        if changed:
            raise DataError(
                f"the position in the data cannot be restored: {'; '.join(changed)}; "
                "change it back, or start a new run in another run.dir"
            )
        self._open[0].set_state(state["grain"])

    def close(self) -> None:
        """Stops prefetching; there are no batches afterwards."""
        self._close()


def _shard(dataset: Dataset, seed: int, index: int, count: int) -> grain.IterDataset[Batch]:
    """The batches of one worker."""
    return dataset.train_batches(seed, slice(index, None, count))


def _close_all(iterators: list[Any], stop: threading.Event) -> None:
    stop.set()
    while iterators:
        iterators.pop().close()


def _differences(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """How the records differ from those of the checkpoint; their number is known to be the same.

    Repaired files are accepted: their size and up to half of their sampled records may differ.
    """
    if before is None or now is None:
        return []
    if "digest" in before and "digest" in now:
        same = before["digest"] == now["digest"] or not before["digest"]
        return [] if same else ["the prepared data holds different records from those of the checkpoint"]
    problems = []
    if "digest" in before or "digest" in now:  # read directly then, prepared now to skip malformed records
        return []
    for (_, old_size, *old), (name, size, *new) in zip(before["files"], now["files"], strict=False):
        different = sum(one != other for one, other in zip(old[0], new[0], strict=False))
        if different > max(1, len(new[0]) // 2):
            problems.append(f"{name} holds different text from that of the checkpoint, in as many records")
        elif different or old_size != size:
            say(f"{name} has changed in some records since the checkpoint, though not in their number; continuing")
    return problems
