"""The batches of a run: shuffled anew every epoch, endless, and resumed exactly.

Every process of a run reads all of it and gives its devices their rows: so the order of the data depends neither on
the mesh nor on the number of processes, and a place in it means the same to all of them.
"""

import dataclasses
import itertools
import json
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
from grain.experimental import ThreadPrefetchIterDataset

from memjax.config import DataConfig
from memjax.data import packing
from memjax.data.packing import Batch
from memjax.data.parts import Part, open_parts, order, reader_of
from memjax.data.sampling import sample_texts
from memjax.data.tokenizer import Tokenizer, train_bpe
from memjax.data.tokenizer_files import open_tokenizer
from memjax.data.workers import Workers
from memjax.errors import DataError

__all__ = ["Batch", "TrainingData", "train_tokenizer", "validation_batches"]

_READY_BATCHES = 4


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
    return train_bpe(sample_texts(config, config.tokenizer.train_bytes), vocab_size)


class TrainingData(Iterator[Batch]):
    """An endless iterator over batches, whose place can be saved and found again.

    The same arguments give the same batches. Batches are made ahead by a thread, or by `config.num_workers` processes;
    a program that uses workers must keep its own start under `if __name__ == "__main__"`.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, seed: int):
        """Opens the data.

        Args:
            config: what to read, and the shape of batches.
            tokenizer: makes the ids.
            seed: orders the records and chooses the wordings.

        Raises:
            DataError: the training data cannot be used.
        """
        self.parts, _ = open_parts(config, tokenizer)
        self._plan = {
            "num_workers": config.num_workers,
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "source": config.source,
            "num_records": sum(part.stop for part in self.parts),
            "packing": config.packing,
            "sequence_length": config.sequence_length,
            "batch_size": config.batch_size,
            "shuffle": config.shuffle,
        }
        if config.source == "mixture":
            self._plan["mixture"] = [
                {"name": part.name, "weight": part.weight, "num_records": opened.stop}
                for part, opened in zip(config.mixture, self.parts, strict=True)
            ]
        recipe = _Recipe(config, self.parts, seed % 2**32)
        batches: Iterator[Batch]
        if config.num_workers:
            batches = Workers(recipe.shard, config.num_workers)
        else:
            batches = iter(ThreadPrefetchIterDataset(recipe.shard(0, 1), prefetch_buffer_size=_READY_BATCHES))
        self._open: list[Any] = [batches]
        # A thread or process that still reads when the interpreter goes down would abort it with an exit code of its
        # own, so what nobody closed is closed, and let go of, before.
        self._close = weakref.finalize(self, _close_all, self._open)

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        return next(self._open[0])

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


def validation_batches(config: DataConfig, tokenizer: Tokenizer, *, batches: int) -> Iterator[Batch]:
    """The first batches of the validation records, in file order, the same at every call.

    Of a mixture the records held out of the parts come mixed as in training.

    The last batch is padded with empty rows. Nothing comes when the config holds nothing out.

    Raises:
        DataError: the validation data cannot be used.
    """
    _, parts = open_parts(config, tokenizer)
    if not parts:
        return
    found = packing.batches(
        order(parts, seed=0, shuffle=False, repeat=False),
        reader_of(parts, config),
        packing=config.packing,
        sequence_length=config.sequence_length,
        num_rows=config.batch_size,
        document_mask=config.document_mask,
        seed=0,
    )
    yield from itertools.islice(found, batches)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """Makes the batches of a run, or every n-th block of records for a worker."""

    config: DataConfig
    parts: Sequence[Part]
    seed: int

    def shard(self, index: int, count: int) -> grain.IterDataset[Batch]:
        """The batches of one of several workers."""
        config = self.config
        return packing.batches(
            order(self.parts, seed=self.seed, shuffle=config.shuffle, repeat=True),
            reader_of(self.parts, config),
            packing=config.packing,
            sequence_length=config.sequence_length,
            num_rows=config.batch_size,
            document_mask=config.document_mask,
            seed=self.seed,
            with_sources=config.source == "mixture",
            shard=slice(index, None, count),
        )


def _close_all(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


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
