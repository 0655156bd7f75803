"""The batches of a run: shuffled anew every epoch, endless, shared out over processes, and resumed exactly."""

import itertools
import json
import math
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from memjax.config import DataConfig
from memjax.data import packing
from memjax.data.packing import Batch
from memjax.data.records import DataError, Source
from memjax.data.sources import open_sources
from memjax.data.tokenizer import Tokenizer, train_bpe
from memjax.data.tokenizer_files import open_tokenizer

__all__ = ["Batch", "TrainingData", "train_tokenizer", "validation_batches"]

_READY_BATCHES = 4
_BIOGRAPHY_PASSES = 5
"""Tellings of each record that a BPE is trained on: about as many as there are wordings."""


def train_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that the config asks for; a BPE is trained on texts spread evenly over the training records.

    Args:
        config: the data, and how much of it to train on.
        vocab_size: the most tokens; a small corpus may give fewer, and bytes always take 259.

    Raises:
        ValueError: vocab_size is below 259.
        DataError: the training data or the tokenizer's file cannot be used.
    """
    if config.tokenizer.kind != "bpe":
        return open_tokenizer(config.tokenizer)
    source, _ = open_sources(config)
    passes = _BIOGRAPHY_PASSES if config.source == "biographies" else 1
    return train_bpe(_sample(source, passes, config.tokenizer.train_bytes), vocab_size)


def _sample(source: Source, passes: int, num_bytes: int) -> Iterator[str]:
    """Texts of all records, or of records evenly spread, until there are num_bytes."""
    rng = np.random.default_rng(0)
    # Steps of the golden ratio reach every record once, and wherever they stop they have been everywhere equally.
    step = max(1, round(len(source) * 0.618034))
    while math.gcd(step, len(source)) > 1:
        step += 1
    for count in range(passes * len(source)):
        for segment in source.draw(count * step % len(source), rng):
            yield segment.text
            num_bytes -= len(segment.text.encode())
        if num_bytes <= 0:
            return


class TrainingData(Iterator[Batch]):
    """An endless iterator over this process's rows of every batch, whose place can be saved and found again.

    The same arguments give the same batches. Batches are made ahead by a thread, or by `config.num_workers` processes;
    a program that uses workers must keep its own start under `if __name__ == "__main__"`.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, seed: int, process_index: int = 0, process_count: int = 1
    ):
        """Opens the data.

        Args:
            config: what to read, and the shape of batches (batch_size is that of all processes together).
            tokenizer: makes the ids.
            seed: orders the records and chooses the wordings.
            process_index: the number of this process, from 0.
            process_count: processes that share each batch; of the records in the order of all epochs, each takes every
                process_count-th.

        Raises:
            ValueError: the processes cannot share a batch evenly.
            DataError: the training data cannot be used.
        """
        _check_processes(config, process_index, process_count)
        source, _ = open_sources(config)
        self._plan = {
            "num_workers": config.num_workers,
            "process_count": process_count,
            "process_index": process_index,
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "source": config.source,
            "num_records": len(source),
            "packing": config.packing,
            "sequence_length": config.sequence_length,
            "batch_size": config.batch_size,
            "shuffle": config.shuffle,
        }
        grain_seed = seed % 2**32
        numbers = grain.MapDataset.range(len(source)).seed(grain_seed)
        if config.shuffle:
            numbers = numbers.shuffle()
        numbers = numbers.repeat()
        if process_count > 1:
            numbers = numbers[process_index::process_count]
        batches = packing.batches(
            numbers,
            source,
            tokenizer,
            packing=config.packing,
            sequence_length=config.sequence_length,
            num_rows=config.batch_size // process_count,
            document_mask=config.document_mask,
            seed=(grain_seed + process_index) % 2**32,
        )
        if config.num_workers:
            # Grain's workers read absl's flags, which only programs started through absl have parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=_READY_BATCHES)
            batches = batches.mp_prefetch(options)
        else:
            batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_READY_BATCHES)
        self._open = [iter(batches)]
        # A thread or process that still reads when the interpreter goes down would abort it with an exit code of its
        # own, so what nobody closed is closed, and let go of, before.
        self._close = weakref.finalize(self, _close_all, self._open)

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        batch = next(self._open[0])
        if self._plan["num_workers"]:
            # Workers hand over shared memory, which is given back only when the last array that looks at it is gone.
            batch = {name: np.array(rows) for name, rows in batch.items()}
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch given, as JSON values; not to be asked for after `close`."""
        return {"plan": dict(self._plan), "grain": json.loads(json.dumps(self._open[0].get_state()))}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a place that `get_state` gave.

        Raises:
            DataError: it was given with other data, another tokenizer or other settings, where it means another place.
        """
        saved = state["plan"]
        changed = [
            f"{name}={now!r} here, {saved.get(name)!r} in the checkpoint"
            for name, now in self._plan.items()
            if saved.get(name) != now
        ]
        if changed:
            raise DataError(
                f"the place in the data cannot be restored: {'; '.join(changed)}; "
                "set it back, or start a new run in another run.dir"
            )
        self._open[0].set_state(_with_tuples(state["grain"]))

    def close(self) -> None:
        """Ends the threads and processes that read ahead; there are no batches after that."""
        self._close()


def validation_batches(
    config: DataConfig, tokenizer: Tokenizer, *, batches: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """This process's rows of the first batches of the validation records, in file order, the same at every call.

    Every process sees the same number of batches; the last is padded with empty rows. Nothing comes when the config
    holds nothing out.

    Raises:
        ValueError: the processes cannot share a batch evenly.
        DataError: the validation data cannot be used.
    """
    _check_processes(config, process_index, process_count)
    _, source = open_sources(config)
    if source is None:
        return
    # Every process packs all rows and keeps its own: packing shares apart could give them unequal numbers of batches,
    # and a process that stops early would leave the others waiting.
    whole = packing.batches(
        grain.MapDataset.range(len(source)),
        source,
        tokenizer,
        packing=config.packing,
        sequence_length=config.sequence_length,
        num_rows=config.batch_size,
        document_mask=config.document_mask,
        seed=0,
    )
    for batch in itertools.islice(whole, batches):
        yield packing.take_rows(batch, process_index, process_count)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _check_processes(config: DataConfig, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..process_count - 1 = {process_count - 1}")
    if config.batch_size % process_count:
        raise ValueError(
            f"data.batch_size={config.batch_size} must be a multiple of the {process_count} processes that share it"
        )


def _with_tuples(state: Any) -> Any:
    """Grain's state as it was before JSON: concat compares its slices with tuples, and takes a list for a remainder."""
    if isinstance(state, dict):
        return {
            name: {feature: tuple(bounds) for feature, bounds in value.items()}
            if name == "remainder_slices"
            else _with_tuples(value)
            for name, value in state.items()
        }
    if isinstance(state, list):
        return [_with_tuples(value) for value in state]
    return state
