"""Times the input pipeline of whichever memjax is importable: `pipeline_case.py FOLDER RESULT SECONDS`.

Started by pipeline.py, which makes the folder, also with older checkouts, so it uses only what all of them have.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
import sys
import threading
import time

from memjax.config.data import BiographiesConfig, DataConfig, MixtureConfig
from memjax.data.dataset import open_dataset
from memjax.data.sources.kinds import Files, find_source
from memjax.data.tokenizers.base import Tokenizer

LEAST_BATCHES = 4


def main() -> None:
    """Writes tokens per second of wall-clock and of CPU time as JSON, by kind of data and packing."""
    folder, result, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
    tokenizer = Tokenizer.load(folder)
    prepared = folder / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    base = DataConfig(sequence_length=256, batch_size=128, validation_fraction=0.002)
    paths = {name: str(folder / f"{name}.jsonl") for name in ("facts", "articles")}
    kinds = {
        name: dataclasses.replace(base, source="jsonl", path=path, prepared=str(prepared / name))
        for name, path in paths.items()
    }
    found: dict[str, dict[str, float]] = {}

    def add(name: str, packing: str, tokens: int, begun: float, busy: float) -> None:
        wall, processors = time.perf_counter() - begun, time.process_time() - busy
        found[f"{name}, {packing}"] = {"tokens/s": tokens / wall, "tokens/CPU s": tokens / processors}

    def batches(name: str, config: DataConfig) -> None:
        for packing in ("none", "concat", "first_fit"):
            dataset = open_dataset(dataclasses.replace(config, packing=packing), tokenizer)
            data = iter(dataset.train_batches(0, stop=threading.Event()))  # as in training without workers
            next(data)
            tokens, begun, busy = 0, time.perf_counter(), time.process_time()
            for count in itertools.count(1):
                tokens += int((next(data)["segments"] > 0).sum())
                if time.perf_counter() - begun > seconds and count >= LEAST_BATCHES:
                    break
            add(name, packing, tokens, begun, busy)

    for name, config in kinds.items():
        batches(name, config)
    for name, config in kinds.items():
        source = find_source(config)
        assert isinstance(source, Files)
        begun, busy = time.perf_counter(), time.process_time()
        source.prepare(tokenizer, every_seconds=1e9)
        (split,), _ = source.open(tokenizer)
        assert split.manifest is not None
        add(f"{name}, prepared", "preparing", split.manifest.tokens, begun, busy)
        batches(f"{name}, prepared", config)
    parts = tuple(MixtureConfig(name=name, path=path) for name, path in paths.items())
    mixture = dataclasses.replace(base, source="mixture", mixture=parts, prepared=str(prepared))
    batches("facts and articles, mixed", mixture)
    people = BiographiesConfig(num_people=20_000)
    batches("biographies", dataclasses.replace(base, source="biographies", biographies=people))
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
