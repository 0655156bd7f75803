"""The data of a run, opened once: training and validation batches share the same files, scans and token caches.

Five stages, each built on the one above it:

1. a `Source` finds, lists and scans the files that the config names (`sources`);
2. a `Reader` returns records by number as token ids, from text or from prepared data (`tokenize`, `prepared`);
3. an `Order` shuffles record numbers and mixes them by weight, endlessly for training (`mixture`);
4. packing turns records into batches (`packing`, `packers`);
5. a thread or worker processes prefetch batches, and their position can be saved (`loader`, `workers`).
"""

import dataclasses
import itertools
import threading
from collections.abc import Iterator

import grain
import numpy as np

from memjax.config.data import DataConfig
from memjax.data import packing
from memjax.data.mixture import Order, Split
from memjax.data.packing import Batch
from memjax.data.prepared.store import PreparedReader
from memjax.data.sources.kinds import Source, find_source
from memjax.data.tokenize import joined, stoppable
from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.bpe import train_bpe
from memjax.data.tokenizers.open import open_tokenizer

_SAMPLED_RECORDS, _SAMPLED_PAIRS = 64, 1 << 16
"""The number of tokens is estimated from at most this many records, or fewer once they hold this many pairs."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The training and validation data. Picklable: worker processes get a copy."""

    config: DataConfig
    tokenizer: Tokenizer
    train: list[Split]
    validation: list[Split]
    """Empty when nothing is held out."""

    def train_batches(
        self, seed: int, shard: slice = slice(None), stop: threading.Event | None = None
    ) -> grain.IterDataset[Batch]:
        """Endless training batches. `shard` selects the blocks of records that one of several workers reads; setting
        `stop` interrupts a batch that another thread is building.
        """
        return self._batches(
            self.train, seed=seed % 2**32, shuffle=self.config.shuffle, repeat=True, shard=shard, stop=stop
        )

    def validation_batches(self, count: int) -> Iterator[Batch]:
        """The first `count` batches of the validation records, in file order, the same at every call.

        The held-out records of a mixture are mixed as in training. The last batch is padded with empty rows. Yields
        nothing if nothing is held out.

        Raises:
            DataError: the validation data cannot be used.
        """
        if self.validation:
            yield from itertools.islice(self._batches(self.validation, seed=0, shuffle=False, repeat=False), count)

    def _batches(
        self,
        splits: list[Split],
        *,
        seed: int,
        shuffle: bool,
        repeat: bool,
        shard: slice = slice(None),
        stop: threading.Event | None = None,
    ) -> grain.IterDataset[Batch]:
        config, read = self.config, joined([split.reader for split in splits])
        return packing.batches(
            Order(splits, seed=seed, shuffle=shuffle, repeat=repeat),
            read if stop is None else stoppable(read, stop),
            packing=config.packing,
            sequence_length=config.sequence_length,
            num_rows=config.batch_size,
            document_mask=config.document_mask,
            seed=seed,
            with_sources=config.source == "mixture" and repeat,
            shard=shard,
        )

    def malformed_counts(self) -> dict[str, int]:
        """The number of skipped training records, for metrics; empty if no record may be skipped."""
        manifests = [split.manifest for split in self.train if split.manifest is not None]
        if not any(manifest.settings["malformed"] == "skip" for manifest in manifests):
            return {}
        return {"data/malformed": sum(manifest.malformed for manifest in manifests)}

    def describe(self, steps: int | None = None) -> list[str]:
        """Lines about prepared data and its skipped records, then about records, tokens and the epochs in `steps`."""
        lines = []
        for split in self.train:
            if isinstance(split.reader, PreparedReader):
                manifest = split.reader.manifest
                lines.append(
                    f"prepared   {split.reader.folder}: {manifest.usable:,} records, {manifest.tokens:,} tokens"
                    + (f", {manifest.malformed:,} malformed records skipped, such as" if manifest.malformed else "")
                )
                lines += [f"           {example}" for example in manifest.examples[:3]]
        names = [part.name for part in self.config.mixture] or [None]
        shares = np.array([split.weight for split in self.train])
        for name, split, share in zip(names, self.train, shares / shares.sum(), strict=True):
            lines.append(f"records    {f'{name}: ' if name else ''}{self._amount(split, steps, share)}")
        held_out = sum(split.stop - split.start for split in self.validation)
        records = "record" if held_out == 1 else "records"
        return [*lines[:-1], f"{lines[-1]}; {held_out:,} {records} for validation" if held_out else lines[-1]]

    def _amount(self, split: Split, steps: int | None, share: float) -> str:
        count, config = split.stop - split.start, self.config
        tokens, is_exact = _num_tokens(split)
        amount = f"{count:,} for training, {'' if is_exact else 'about '}{tokens:,} tokens"
        if steps is None:
            return amount
        read = steps * share * config.batch_size
        if config.packing == "none":
            return f"{amount}; {steps:,} steps read {read / count:.3g} epochs"
        return f"{amount}; {steps:,} steps read about {read * config.sequence_length / tokens:.3g} epochs"


def open_dataset(data: DataConfig | Source, tokenizer: Tokenizer) -> Dataset:
    """Opens the data of a config, or of a source found earlier, whose files are not scanned again.

    Data that must be prepared is prepared here unless it already was. Prepared data gives the same tokens.

    Raises:
        DataError: the data cannot be used, or the prepared data was made from something else.
    """
    source = data if isinstance(data, Source) else find_source(data)
    return Dataset(source.config, tokenizer, *source.open(tokenizer))


def train_tokenizer(data: DataConfig | Source, vocab_size: int) -> Tokenizer:
    """The tokenizer that the config asks for; a BPE is trained on texts spread evenly over the training records.

    vocab_size is an upper bound: a small corpus may give fewer tokens, and byte tokenizers always have 259.

    Raises:
        ValueError: vocab_size is below 259.
        DataError: the training data or the tokenizer's file cannot be used.
    """
    source = data if isinstance(data, Source) else find_source(data)
    config = source.config.tokenizer
    return train_bpe(source.texts(config.train_bytes), vocab_size) if config.kind == "bpe" else open_tokenizer(config)


def _num_tokens(split: Split) -> tuple[int, bool]:
    """The number of tokens of a split, and whether it is exact rather than an estimate."""
    count, manifest = split.stop - split.start, split.manifest
    if manifest is not None:
        return max(1, round(manifest.tokens * count / manifest.records)), count == manifest.records
    rng, pairs, read = np.random.default_rng(0), 0, 0
    samples = min(_SAMPLED_RECORDS, count)
    for sample in range(samples):
        pairs += len(split.reader([split.start + sample * count // samples], rng).pairs)
        read += 1
        if pairs >= _SAMPLED_PAIRS:
            break
    if read == count:
        return max(1, pairs), True
    tokens = pairs * count // read
    step = 10 ** max(0, len(str(tokens)) - 2)  # an estimate is rounded to two digits
    return max(1, round(tokens / step) * step), False
