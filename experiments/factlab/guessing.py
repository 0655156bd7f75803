"""Does a model know what it does not know? Confidence signals for facts stated often, seldom and never.

Every signal is expected to be higher if the model knows the answer; its sign is fixed in advance, not chosen from the
results.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from factlab.rows import EOS, FactRows
from factlab.training import FactTrainer
from memjax.knowledge.reads import LayerRun, run_layers, tables_of
from memjax.training.state import TrainState

MOST = 9_000
"""Maximum number of questions about facts stated equally often."""
COVERAGES = (0.5, 0.8, 0.95)
SURE = 0.5
"""Answers count as confident from this probability of the whole answer."""
BINS = 15

Values = dict[str, np.ndarray]


def measure(trainer: FactTrainer, state: TrainState, *, epochs: float, most: int = MOST) -> dict[str, Any]:
    """Tests a model in the test wording, and how well each signal tells what it knows.

    `levels` holds, by how often a fact was stated: number of questions, share answered correctly, mean probability of
    the answers, share of confident answers, and calibration error. `signals` holds the AUROC of each signal: facts
    stated n times against those never stated (by n), correct answers against those about facts never stated (`known`),
    and correct against wrong answers among all stated facts (`right`). `wrong_at` holds the share of wrong answers
    among the most confident ones about stated facts, by coverage.
    """
    chosen, times = choose(trainer.rows, epochs, most)
    found = _ask(trainer, state, chosen)
    right, sure, kinds = found.pop("right"), found["answer"], trainer.rows.groups[chosen]
    told = times > 0
    levels = {str(level): _level(right[times == level], sure[times == level]) for level in np.unique(times).tolist()}
    result = {
        "levels": levels,
        "calibration_error": calibration_error(sure[told], right[told]),
        "wrong_at": {str(share): wrong_at(share, sure[told], right[told]) for share in COVERAGES},
        "signals": {name: _aurocs(values, times, right, kinds) for name, values in found.items()},
    }
    return jax.tree.map(lambda number: round(number, 5), result)


def choose(rows: FactRows, epochs: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses at most `most` facts for each number of statements; returns the facts, and how often each was stated.

    Facts whose test wording is part of the training data are not chosen.
    """
    kept, rng = rows.first_wording > 0, np.random.default_rng(0)
    usable = (kept | (rows.told == 0)) if kept.any() else ~kept
    levels = [np.flatnonzero(usable & (rows.told == level)) for level in np.unique(rows.told)]
    chosen = np.concatenate([rng.permutation(facts)[:most] for facts in levels])
    return chosen, np.round(rows.told[chosen] * epochs).astype(int)


def _level(right: np.ndarray, sure: np.ndarray) -> dict[str, float]:
    return {
        "questions": len(right),
        "right": float(right.mean()),
        "probability": float(sure.mean()),
        "confident": float((sure >= SURE).mean()),
        "calibration_error": calibration_error(sure, right),
    }


def _aurocs(values: np.ndarray, times: np.ndarray, right: np.ndarray, kinds: np.ndarray) -> dict[str, float | None]:
    never, told = times == 0, times > 0
    pairs = {str(level): (times == level, never) for level in np.unique(times[told]).tolist()}
    pairs |= {"known": (told & right, never), "right": (told & right, told & ~right)}
    return {name: auroc_within(kinds, values, *pair) for name, pair in pairs.items()}


def auroc_within(kinds: np.ndarray, values: np.ndarray, higher: np.ndarray, lower: np.ndarray) -> float | None:
    """AUROC within each attribute or relation, averaged with the number of `higher` as weights.

    Thus no signal profits from distinguishing attributes, some of which are easier.
    """
    parts = []
    for kind in np.unique(kinds):
        one = auroc(values[higher & (kinds == kind)], values[lower & (kinds == kind)])
        if one is not None:
            parts.append((one, np.count_nonzero(higher & (kinds == kind))))
    if not parts:
        return None
    aurocs, counts = zip(*parts, strict=True)
    return float(np.average(aurocs, weights=counts))


def auroc(higher: np.ndarray, lower: np.ndarray) -> float | None:
    """How often a value of the first exceeds one of the second, ties counting half; None if either is empty."""
    if not len(higher) or not len(lower):
        return None
    lower = np.sort(lower)
    below, not_above = np.searchsorted(lower, higher, "left"), np.searchsorted(lower, higher, "right")
    return float((below + not_above).mean() / 2 / len(lower))


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean distance between probability and accuracy, in bins of equal width."""
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, probability - right, BINS)
    return float(np.abs(gaps).sum() / len(right))


def wrong_at(coverage: float, confidence: np.ndarray, right: np.ndarray) -> float:
    """The share of wrong answers if only the most confident `coverage` of the questions is answered."""
    answered = np.argsort(-confidence, kind="stable")[: max(1, round(coverage * len(right)))]
    return float(1 - right[answered].mean())


def _ask(trainer: FactTrainer, state: TrainState, facts: np.ndarray) -> Values:
    """Correctness of the answers, and every signal, in the order of the facts."""
    size, found, ask = min(trainer.test_rows, len(facts)), [], _program(trainer)
    for start in range(0, len(facts), size):
        # The last batch repeats facts, so that all have the same shape.
        some = np.resize(facts[start : start + size], size)
        questions = trainer.rows.tokens[some, 0], trainer.rows.answers[some, 0]
        found.append(jax.device_get(ask(state, *questions)))
    return {name: np.concatenate([part[name] for part in found])[: len(facts)] for name in found[0]}


@functools.lru_cache
def _program(trainer: FactTrainer) -> Any:
    """The test, compiled once for all runs of a model."""
    return jax.jit(functools.partial(_examined, trainer))


def _examined(trainer: FactTrainer, state: TrainState, tokens: Array, answers: Array) -> dict[str, Array]:
    rows, begins = jnp.arange(len(tokens)), answers[:, 0]
    written = trainer.write(state.params, state.tables, tokens, begins)
    model = trainer.program.parts.merge(state.params, state.tables)
    runs, x = run_layers(model, written[:, :-1])
    logits = model.logits(model.norm(x).normed)
    chances = jax.nn.log_softmax(logits, axis=-1)

    places = jnp.arange(1, tokens.shape[1])[None, :]
    targets = written[:, 1:]
    inside = (places >= begins[:, None]) & (places < begins[:, None] + trainer.longest)
    ended = jnp.cumsum((targets == EOS) & inside, axis=1) - ((targets == EOS) & inside)
    of_target = jnp.take_along_axis(chances, targets[..., None], axis=-1)[..., 0]
    wanted = (places >= begins[:, None]) & (places < answers[:, 1:])

    first = chances[rows, begins - 1]
    best, second = jnp.moveaxis(jax.lax.top_k(first, 2)[0], -1, 0)
    signals = {
        "right": ((targets == tokens[:, 1:]) | ~wanted).all(axis=1),
        "answer": jnp.exp(jnp.sum(of_target, axis=1, where=inside & (ended == 0))),
        "top": jnp.exp(best),
        "margin": jnp.exp(best) - jnp.exp(second),
        "entropy": jnp.sum(jnp.exp(first) * first, axis=-1),
    }
    is_prompt = places <= begins[:, None]
    for name, run in runs.items():
        layer = model.blocks[int(name[1:])].lookup
        pool = tables_of(model.config, name)[-1]
        moments = state.table_state[pool]["second_moment"]
        for signal, values in _of_memory(layer, run, state.reads[name], moments).items():
            values = values.reshape(targets.shape)
            signals[f"{name} {signal}"] = values[rows, begins - 1]
            signals[f"{name} {signal}, prompt"] = jnp.mean(values, axis=1, where=is_prompt)
    return signals


def _of_memory(layer: Any, run: LayerRun, reads: Array, moments: Array) -> Mapping[str, Float[Array, " t"]]:
    """Signals of a memory layer at every token."""
    scores, slots = layer.keys.search(layer.keys.queries(run.inputs))
    weights = jax.nn.softmax(layer.keys.score_scale * scores.astype(jnp.float32), axis=-1)
    slots = slots.reshape(slots.shape[0], -1)
    norm = lambda vectors: jnp.linalg.norm(vectors.astype(jnp.float32).reshape(len(slots), -1), axis=-1)
    found = {
        "score": scores[..., 0].astype(jnp.float32).mean(axis=-1),
        "weight": weights[..., 0].mean(axis=-1),
        "output": norm(run.out),
        "reads": jnp.log1p(reads.astype(jnp.float32))[slots].mean(axis=-1),
        "gradient": jnp.log(moments.astype(jnp.float32).mean(axis=-1) + 1e-30)[slots].mean(axis=-1),
    }
    gate = getattr(layer, "gate_proj", None)
    return found if gate is None else found | {"gate": norm(jax.nn.silu(gate(run.inputs)))}
