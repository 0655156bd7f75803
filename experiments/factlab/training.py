"""Training on facts: memjax's own step on batches gathered on the device, and tests of recall."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from factlab.rows import FactRows, draw_order
from factlab.steps import Rates, Trainer, rate_by_step, write_greedily
from memjax.config.run import RunConfig
from memjax.evaluation.recall import zero_tables
from memjax.memory.keys import Lookup
from memjax.memory.usage import statistics
from memjax.models.decoder import Decoder
from memjax.models.parts import AnyTables, DecoderParts
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState
from memjax.training.step import Batch

CHUNK = 50
"""Steps per compiled call."""
CURVE_POINTS = 8
TEST_ROWS = 2048
"""Maximum number of questions per forward pass of a test."""


class DeviceRows(NamedTuple):
    """The arrays of FactRows from which batches are made, with facts and wordings flattened to one axis."""

    tokens: Array
    answers: Array
    slots: Array
    """[facts, picks]: the slots of the perfect-address control; without it, there are no columns."""


class Answers(NamedTuple):
    """The results of testing every fact."""

    correct: np.ndarray
    nats: np.ndarray
    """-log p(answer)."""


@dataclasses.dataclass(frozen=True)
class PerfectAddress(DecoderParts):
    """Parts of a decoder whose memory layers do not search: every token of a sentence reads its fact's slots.

    A control that shows what the table could hold with perfect addressing.
    """

    lookup: Any = None

    def merge(self, params: Any, tables: AnyTables) -> Decoder:
        model = DecoderParts.merge(self, params, tables)
        assert self.config.memory is not None
        blocks: Any = model.blocks
        for layer in self.config.memory.layers:
            blocks[layer].memory.lookup = lambda _: self.lookup
        return model


@dataclasses.dataclass(frozen=True)
class Without(DecoderParts):
    """Parts of a decoder whose memory layers lack one of the two projections that the gate adds."""

    part: Literal["gate_proj", "value_proj"] = "gate_proj"

    def merge(self, params: Any, tables: AnyTables) -> Decoder:
        model = DecoderParts.merge(self, params, tables)
        assert self.config.memory is not None
        blocks: Any = model.blocks
        for layer in self.config.memory.layers:
            setattr(blocks[layer].memory, self.part, None)
        return model


class FactTrainer(Trainer):
    """Trains a model on facts."""

    def __init__(self, config: RunConfig, rows: FactRows, *, perfect_address: bool = False, without: str = ""):
        """The config's learning rates must be constant and 1; the rates of a run multiply them.

        Parameters removed by `without` are still counted.
        """
        if config.model.vocab_size < rows.vocab_size or config.data.sequence_length != rows.length:
            raise ValueError(
                f"model.vocab_size={config.model.vocab_size} must be at least {rows.vocab_size} and "
                f"data.sequence_length={config.data.sequence_length} must be {rows.length}, as the facts are"
            )
        program = TrainProgram.of(config)
        super().__init__(config, _with_parts(program, Without, part=without) if without else program)
        self.rows, self.perfect_address = rows, perfect_address
        picks = config.model.memory.picks if perfect_address and config.model.memory else 0
        slots = config.model.memory.num_slots if config.model.memory else 1
        num_facts = len(rows.tokens)
        self.longest = int((rows.answers[:, 0, 1] - rows.answers[:, 0, 0]).max())
        self.test_rows = min(TEST_ROWS, num_facts)
        self.on_device = DeviceRows(
            tokens=jnp.asarray(rows.tokens.reshape(-1, rows.tokens.shape[-1])),
            answers=jnp.asarray(rows.answers.reshape(-1, 2)),
            slots=jnp.asarray(np.random.default_rng(5).integers(slots, size=(num_facts, picks), dtype=np.int32)),
        )
        self._test = jax.jit(self._answer, **self.options)
        self._write = jax.jit(self.write, **self.options)

    def run(
        self,
        rates: Rates,
        *,
        exposures: float,
        seed: int,
        deadline: float | None = None,
        tell: Callable[[str], None] = lambda _: None,
        examine: Callable[[TrainState], dict[str, Any]] = lambda _: {},
    ) -> dict[str, Any]:
        """Trains and tests a model; returns the result as JSON values.

        Args:
            rates: peak learning rates.
            exposures: how often each fact is read, on average; epochs if some are stated more often than others.
            seed: of initialisation and data order.
            deadline: `time.time()` by which the run must have ended.
            tell: receives progress lines.
            examine: returns further measures of the trained model.

        Raises:
            OutOfTime: the deadline would be missed.
        """
        batch_size, told = self.config.data.batch_size, int(self.rows.told.sum())
        steps = max(1, round(exposures * told / batch_size / CHUNK)) * CHUNK
        found = Answers(np.zeros(0, bool), np.zeros(0))

        def measure(state: TrainState) -> dict[str, Any]:
            nonlocal found
            found = self.test(state)
            return self.summary(found)

        def show(step: int, point: dict[str, Any], speed: float, left: float) -> None:
            loss = "not finite" if point["loss"] is None else f"{point['loss']:.3f}"
            tell(f"step {step}/{steps}, loss {loss}, recall {point['recall']:.3f}, {left:.0f} s left")

        state, curve, result = self.train(
            self.on_device,
            draw_order(self.rows, batch_size=batch_size, steps=steps, seed=seed),
            np.stack([rate_by_step(rate, steps) for rate in rates], axis=1),
            measure,
            chunk=CHUNK,
            points={steps * point // CURVE_POINTS // CHUNK * CHUNK for point in range(1, CURVE_POINTS + 1)},
            seed=seed,
            deadline=deadline,
            tell=show,
        )
        return {
            **result,
            "exposures": steps * batch_size / told,
            "facts": int((self.rows.told > 0).sum()),
            **{name: value for name, value in curve[-1].items() if name not in ("step", "tokens", "flops")},
            "by_group": self.by_group(found),
            **self._of_the_table(state),
            **examine(state),
        }

    def test(self, state: TrainState) -> Answers:
        """Tests every fact in its test wording: greedy exact match, and the answer's negative log-likelihood."""
        tokens, answers = self.rows.tokens[:, 0], self.rows.answers[:, 0]
        count = len(tokens)
        fill = -count % self.test_rows
        split = lambda rows: np.pad(rows, [(0, fill), (0, 0)]).reshape(-1, self.test_rows, rows.shape[1])
        numbers = np.pad(np.arange(count, dtype=np.int32), (0, fill)).reshape(-1, self.test_rows)
        found = self._test(state.params, state.tables, self.on_device.slots, split(tokens), split(answers), numbers)
        return Answers(*(np.asarray(part).reshape(-1)[:count] for part in found))

    def summary(self, found: Answers) -> dict[str, Any]:
        """Recall, and stored bits: the model's information about each answer beyond its prior."""
        kept, told = self.rows.first_wording > 0, self.rows.told > 0
        stored = float(np.sum(self.rows.bits - found.nats / np.log(2), where=told))
        summary = {"recall": float(found.correct[told].mean()), "stored_bits": stored}
        if kept.any():
            shares = {"recall_asked": found.correct[told & ~kept], "recall_held_out": found.correct[told & kept]}
            summary |= {name: float(part.mean()) for name, part in shares.items()}
        return summary

    def by_group(self, found: Answers) -> dict[str, float]:
        """Recall of each attribute or relation, over facts with held-out questions if there are any."""
        kept, told = self.rows.first_wording > 0, self.rows.told > 0
        counted = told & (kept if kept.any() else ~kept)
        chosen = {name: counted & (self.rows.groups == place) for place, name in enumerate(self.rows.group_names)}
        return {name: float(found.correct[rows].mean()) for name, rows in chosen.items() if rows.any()}

    def write_answers(self, state: TrainState, facts: np.ndarray) -> dict[int, list[int]]:
        """Greedy answers (token ids) to the test wordings of the given facts, by fact index."""
        written: dict[int, list[int]] = {}
        for start in range(0, len(facts), self.test_rows):
            # The last batch repeats facts, so that all have the same shape.
            some = np.resize(facts[start : start + self.test_rows], self.test_rows)
            begins = self.rows.answers[some, 0, 0]
            tokens = np.asarray(self._write(state.params, state.tables, self.rows.tokens[some, 0], begins))
            for fact, row, begin in zip(some.tolist(), tokens.tolist(), begins.tolist(), strict=True):
                written[fact] = row[begin:]
        return written

    def write(self, params: Any, tables: Any, tokens: Array, begins: Array) -> Array:
        """The rows with answers generated greedily from `begins` on."""
        model = self.program.parts.merge(params, tables)
        return write_greedily(model, tokens, begins, self.longest)

    def _of_the_table(self, state: TrainState) -> dict[str, Any]:
        """Measures of how much the tables are used: slots read in the last part of training, and recall with tables
        zeroed.
        """
        if not state.tables:
            return {}
        parts = self.program.parts
        zeroed = zero_tables(parts.merge(state.params, state.tables))
        without = dataclasses.replace(state, tables={pool: table.rows[...] for pool, table in zeroed.tables.items()})
        used = {name: float(statistics(counts).used_fraction) for name, counts in state.reads.items()}
        return {"used_fraction": used, "recall_zeroed": self.summary(self.test(without))["recall"]}

    def step_of(self, data: DeviceRows, rows: Array) -> tuple[TrainProgram, Batch]:
        """The program (with the facts' addresses in the control), and the rows as a batch."""
        return self._addressed(data.slots, rows // self.rows.tokens.shape[1]), _batch(data, rows)

    def _answer(self, params: Any, tables: Any, slots: Array, *questions: Array) -> tuple[Array, Array]:
        def some(question: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            tokens, answers, numbers = question
            model = self._addressed(slots, numbers).parts.merge(params, tables)
            logits = model.logits(model.hidden(tokens[:, :-1])[0])
            targets, is_answer = tokens[:, 1:], _is_answer(tokens, answers)
            right = (jnp.argmax(logits, axis=-1) == targets) | ~is_answer
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return right.all(axis=1), jnp.sum(losses, axis=1, where=is_answer)

        return jax.lax.map(some, questions)

    def _addressed(self, slots: Array, facts: Array) -> TrainProgram:
        """The program; in the control, with the slots of the facts in the batch."""
        if not self.perfect_address:
            return self.program
        memory = self.program.config.model.memory
        assert memory is not None
        indices = jnp.repeat(slots[facts], self.rows.length, axis=0)
        weights = jnp.full(indices.shape, 1 / memory.top_k, jnp.float32)
        return _with_parts(self.program, PerfectAddress, lookup=Lookup(indices, weights))


def _with_parts(program: TrainProgram, kind: type[DecoderParts], **changes: Any) -> TrainProgram:
    """The program with another class for its parts."""
    fields = {field.name: getattr(program.parts, field.name) for field in dataclasses.fields(DecoderParts)}
    return dataclasses.replace(program, parts=kind(**fields, **changes))


def _is_answer(tokens: Array, answers: Array) -> Array:
    """Mask of the targets that belong to answers, [rows, length]."""
    places = jnp.arange(1, tokens.shape[1])[None, :]
    return (places >= answers[:, :1]) & (places < answers[:, 1:])


def _batch(rows: DeviceRows, numbers: Array) -> Batch:
    """The given rows as a batch of one micro-batch."""
    tokens, answers = rows.tokens[numbers], rows.answers[numbers]
    length = tokens.shape[1] - 1
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": (jnp.arange(length)[None, :] < answers[:, 1:] - 1).astype(jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (len(numbers), length)),
        "loss_mask": _is_answer(tokens, answers).astype(jnp.float32),
    }
    return {name: array[None] for name, array in batch.items()}
