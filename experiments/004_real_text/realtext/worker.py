"""A process that trains one model after another on text: `python -m realtext.worker`, started by factlab.runs."""

import functools
import pathlib
import sys
from typing import Any

import jax
from factlab.steps import Rates
from factlab.worker import environment, serve

from memjax.config.load import load as load_config
from memjax.config.run import RunConfig
from realtext import training
from realtext.corpus import Corpus, load


def run(task: dict[str, Any]) -> dict[str, Any]:
    """The result of a task."""
    corpus = _corpus(task["data"], task["work"])
    trainer = _trainer(task["config"], tuple(task["settings"]), corpus.tokenizer.vocab_size, task["data"], task["work"])
    found = trainer.run(
        Rates(task["lr"], task["table_lr"]),
        epochs=task["exposures"],
        points=task["points"],
        seed=task["seed"],
        measures=task["measures"],
        deadline=task["deadline"],
        tell=lambda line: print(f"[{task['name']}] {line}", file=sys.stderr, flush=True),
    )
    return found | environment()


@functools.lru_cache(maxsize=1)
def _corpus(data: str, work: str) -> Corpus:
    return load(pathlib.Path(data), pathlib.Path(work))


@functools.lru_cache(maxsize=1)
def _trainer(config: str, settings: tuple[str, ...], vocab_size: int, data: str, work: str) -> training.TextTrainer:
    """A trainer for one model; the previous model's programs are dropped to free their memory."""
    # Matrix products are fastest for multiples of 128.
    padded = -(-vocab_size // 128) * 128
    jax.clear_caches()
    given = load_config(RunConfig, pathlib.Path(config), ["--model.vocab_size", str(padded), *settings])
    return training.TextTrainer(given, _corpus(data, work))


if __name__ == "__main__":
    serve(run)
