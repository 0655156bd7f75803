"""Training on text: the library's step on rows of tokens kept on the device, and measures of the model."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from factlab.steps import Rates, Trainer, rate_by_step, write_greedily
from jax import Array

from memjax.config.run import RunConfig
from memjax.evaluation.recall import zero_tables
from memjax.inference.sampling import likelihoods
from memjax.memory.usage import statistics
from memjax.models.loss import map_logits
from memjax.models.parts import Tables
from memjax.monitoring.metrics import peak_flops
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState
from memjax.training.step import Batch
from realtext import grading
from realtext.corpus import STREAMS, WIDTH, Corpus, Spans

MOST_STEPS = 33
"""Maximum number of steps per compiled call."""
WARMUP_STEPS = 200
ANSWER_TOKENS = 10
"""Maximum number of tokens of a generated answer."""
EVALUATED_TOKENS = 1 << 15
"""Tokens per evaluation batch."""


Measures = Literal["all", "curve", "loss"]


class Length(NamedTuple):
    """Length of a run."""

    steps: int
    chunk: int
    """Steps per compiled call."""
    points: tuple[int, ...]
    """Steps after which the model is measured, including the last."""


class Scores(NamedTuple):
    """Scores of rows of tokens."""

    nats: np.ndarray
    """-log p of the scored span."""
    greedy: np.ndarray
    """Whether every token of the span is the most likely one."""


class TextTrainer(Trainer):
    """Trains a model on text."""

    def __init__(self, config: RunConfig, corpus: Corpus):
        """The config's learning rates must be constant and 1; the rates of a run multiply them."""
        if config.model.vocab_size < corpus.tokenizer.vocab_size:
            raise ValueError(f"model.vocab_size={config.model.vocab_size} is below {corpus.tokenizer.vocab_size}")
        super().__init__(config, TrainProgram.of(config))
        self.corpus = corpus
        self.length = config.data.sequence_length
        # A row has one token more than predictions, so each row begins with the last token of the one before.
        self.num_rows = (len(corpus.train) - 1) // self.length
        self.stream = jnp.asarray(np.asarray(corpus.train[: self.num_rows * self.length + 1]))
        self.texts = {name: corpus.texts[name].rows(self.length) for name in STREAMS}
        self._score = jax.jit(self._score_rows, **self.options)
        self._write = jax.jit(self._write_rows, **self.options)

    def run(
        self,
        rates: Rates,
        *,
        epochs: float,
        points: int,
        seed: int,
        measures: Measures = "all",
        deadline: float | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Trains and measures a model; returns the result as JSON values.

        Args:
            rates: peak learning rates.
            epochs: how often each row is read, on average.
            points: how often the model is measured, evenly over the run.
            seed: of initialisation and data order.
            measures: all; curve: only texts and the likelihood of answers; loss: only the training loss.
            deadline: `time.time()` by which the run must have ended.
            tell: receives progress lines.

        Raises:
            OutOfTime: the deadline would be missed.
        """
        length = length_of(epochs * self.num_rows / self.config.data.batch_size, points)
        warmup = min(WARMUP_STEPS, length.steps // 10)

        def measure(state: TrainState) -> dict[str, Any]:
            point = self.measure(state) if measures != "loss" else {}
            return point | ({"slots": self.slots(state)} if state.reads else {})

        def show(step: int, point: dict[str, Any], speed: float, left: float) -> None:
            loss = "not finite" if point["loss"] is None else f"{point['loss']:.3f}"
            shown = f", held out {point['bits_per_byte']['held_out']:.4f} bits/byte" if measures != "loss" else ""
            tell(f"step {step}/{length.steps}, loss {loss}{shown}, {speed:,.0f} tokens/s, {left:.0f} s left")

        state, _, result = self.train(
            self.stream,
            draw_order(self.num_rows, self.config.data.batch_size, length.steps, seed),
            np.stack([rate_by_step(rate, length.steps, warmup) for rate in rates], axis=1),
            measure,
            chunk=length.chunk,
            points=length.points,
            seed=seed,
            deadline=deadline,
            tell=show,
        )
        peak = peak_flops(jax.devices()[0])
        return {
            **result,
            "epochs": length.steps * self.config.data.batch_size / self.num_rows,
            **(self.examine(state) if measures == "all" else {}),
            "flops_utilization": result["tokens_per_second"] * result["flops_per_token"] / peak if peak else None,
        }

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Bits per byte of the texts, and negative log-likelihoods of the answers by group."""
        asked = self.score(state, self.corpus.asked)
        return {"bits_per_byte": self.bits_per_byte(state), "answers": grading.nats(self.corpus.questions, asked.nats)}

    def bits_per_byte(self, state: TrainState) -> dict[str, float]:
        """Bits per byte of each text."""
        found = {}
        for name, rows in self.texts.items():
            ends = np.tile(np.array([[1, self.length + 1]], np.int32), (len(rows), 1))
            nats = self.score(state, Spans(rows, ends)).nats.sum(dtype=np.float64)
            found[name] = float(nats / math.log(2) / self.corpus.texts[name].bytes)
        return found

    def slots(self, state: TrainState) -> dict[str, dict[str, float]]:
        """How evenly the slots were read since the counters were reset, by layer."""
        return {
            name: {field: float(value) for field, value in statistics(counts)._asdict().items()}
            for name, counts in state.reads.items()
        }

    def examine(self, state: TrainState) -> dict[str, Any]:
        """Measures taken only at the end: generated answers, multiple choice, the model without its tables."""
        questions, chosen = self.corpus.questions, self.score(state, self.corpus.chosen)
        written = [self.corpus.tokenizer.decode(ids) for ids in self.write(state, self.corpus.asked)]
        found = {
            "written": grading.written(questions, written),
            "examples": [[question["question"], answer] for question, answer in zip(questions, written, strict=True)][
                ::400
            ],
            "choices": grading.choices(self.corpus.choices, chosen.nats),
            "by_relation": grading.by_relation(questions, self.score(state, self.corpus.asked).nats, written),
        }
        if not state.tables:
            return found
        zeroed = zero_tables(self.program.parts.merge(state.params, state.tables))
        tables = {pool: table.rows[...] for pool, table in zeroed.tables.items()}
        return found | {"zeroed": self.measure(dataclasses.replace(state, tables=tables))}

    def score(self, state: TrainState, rows: Spans) -> Scores:
        """Scores the given span of each row; BOS tokens are never scored."""
        parts = [
            self._score(state.params, state.tables, tokens, ends)
            for tokens, ends, _ in _batches(rows, EVALUATED_TOKENS // rows.tokens.shape[1])
        ]
        columns = zip(*jax.device_get(parts), strict=True)
        return Scores(*(np.concatenate(column)[: len(rows.tokens)] for column in columns))

    def write(self, state: TrainState, rows: Spans) -> list[list[int]]:
        """Greedily generated tokens in place of each row's answer."""
        written: list[list[int]] = []
        for tokens, ends, count in _batches(rows, EVALUATED_TOKENS // WIDTH):
            found = np.asarray(self._write(state.params, state.tables, tokens, ends[:, 0]))
            begins = ends[:, 0].tolist()
            written += [
                row[begin : begin + ANSWER_TOKENS]
                for row, begin in zip(found.tolist()[:count], begins[:count], strict=True)
            ]
        return written

    def step_of(self, data: Array, rows: Array) -> tuple[TrainProgram, Batch]:
        """The program, and the rows as a batch, split into the config's micro-batches."""
        places = rows[:, None] * self.length + jnp.arange(self.length + 1)[None, :]
        tokens = data[places].astype(jnp.int32)
        shape = (self.config.train.grad_accum_steps, -1, self.length)
        ones = jnp.ones((len(rows), self.length), jnp.int32)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": ones,
            "positions": jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), ones.shape),
            "loss_mask": ones.astype(jnp.float32),
        }
        return self.program, {name: array.reshape(shape) for name, array in batch.items()}

    def _score_rows(self, params: Any, tables: Tables, tokens: Array, ends: Array) -> tuple[Array, Array]:
        model = self.program.parts.merge(params, tables)
        targets, places = tokens[:, 1:], jnp.arange(1, tokens.shape[1])[None, :]
        counted = (places >= ends[:, :1]) & (places < ends[:, 1:]) & (targets != self.corpus.tokenizer.bos_id)

        def compare(logits: Array, targets: Array) -> tuple[Array, Array]:
            return likelihoods(logits, targets, 0).chosen, jnp.argmax(logits, axis=-1) == targets

        log_p, best = map_logits(model, compare, model.hidden(tokens[:, :-1])[0], targets)
        return -jnp.sum(log_p, axis=1, where=counted), (best | ~counted).all(axis=1)

    def _write_rows(self, params: Any, tables: Tables, tokens: Array, begins: Array) -> Array:
        return write_greedily(self.program.parts.merge(params, tables), tokens, begins, ANSWER_TOKENS)


def length_of(steps: float, points: int) -> Length:
    """The length closest to `steps` with compiled calls of equal length that end at the points."""
    chunk = max(1, min(MOST_STEPS, round(steps / points)))
    per_point = max(1, round(steps / points / chunk)) * chunk
    return Length(per_point * points, chunk, tuple(per_point * point for point in range(1, points + 1)))


def draw_order(num_rows: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Row indices of each batch, [steps, batch_size]; all rows are reshuffled in every epoch."""
    rng = np.random.default_rng([seed, 4])
    count = steps * batch_size
    shuffled = [rng.permutation(num_rows) for _ in range(-(-count // num_rows))]
    return np.concatenate(shuffled)[:count].astype(np.int32).reshape(steps, batch_size)


def _batches(rows: Spans, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Batches of `size` rows (or all, if fewer): tokens, ends, and the number of rows that are not just filling."""
    size = max(1, min(size, len(rows.tokens)))
    for start in range(0, len(rows.tokens), size):
        some = np.arange(start, start + size) % len(rows.tokens)
        yield rows.tokens[some].astype(np.int32), rows.ends[some], min(size, len(rows.tokens) - start)
