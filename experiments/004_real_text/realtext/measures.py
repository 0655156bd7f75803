"""Extracts measures from results, and groups results by family."""

from collections.abc import Callable
from statistics import variance

from factlab.report import grouped
from factlab.runs import Result

from realtext.grading import IN_TEXT, NOT_IN_TEXT

Value = Callable[[Result], float]
Families = dict[str, list[Result]]

COMPARED = ("full", "134m", "others", "134m_others", "seeds", "134m_seeds")
"""Stages whose runs train on the same text for the same number of epochs."""
NAMES = {
    "dense_x1": "dense",
    "dense_x2": "dense, twice the arithmetic",
    "moe": "mixture of 16 experts",
    "peer": "PEER, 524,176 experts",
    "memory": "one memory layer, 1,048,576 slots",
    "memory_plus_small": "Memory+, three layers share 65,536 slots",
    "memory_plus": "Memory+, 1,048,576 slots",
    "memory_plus_large": "Memory+, 4,194,304 slots",
    "134m_dense": "dense of 134m",
    "134m_dense_x2": "dense of 134m, twice the arithmetic",
    "134m_moe": "mixture of 16 experts of 134m",
    "134m_memory_plus": "Memory+ of 134m, 1,048,576 slots",
}
ORDER = tuple(NAMES)
"""Order of the families in tables."""
DENSE = ("dense_x1", "dense_x2", "134m_dense", "134m_dense_x2")
"""The dense models of both sizes form one series: 134m_dense has 4.1 times the arithmetic of dense_x1."""


def bits(text: str) -> Value:
    """Final bits per byte of a text."""
    return lambda row: row["curve"][-1]["bits_per_byte"][text]


def nats(group: str) -> Value:
    """Final negative log-likelihood of the answers to a group of questions."""
    return lambda row: row["curve"][-1]["answers"][group]


def match(group: str) -> Value:
    """Exact match of generated answers."""
    return lambda row: row["written"][group]["exact_match"]


def f1(group: str) -> Value:
    """F1 of generated answers."""
    return lambda row: row["written"][group]["f1"]


SQUAD = tuple(f"SQuAD, {place}" for place in (IN_TEXT, NOT_IN_TEXT))
MEASURES: dict[str, Value] = {
    "bits per byte, held out": bits("held_out"),
    "bits per byte, training articles": bits("seen"),
    f"nats, {IN_TEXT}": nats(IN_TEXT),
    f"nats, {NOT_IN_TEXT}": nats(NOT_IN_TEXT),
    f"nats, {SQUAD[0]}": nats(SQUAD[0]),
    f"nats, {SQUAD[1]}": nats(SQUAD[1]),
}
COMPARISONS = ("bits per byte, held out", "bits per byte, training articles", f"nats, {IN_TEXT}", f"nats, {SQUAD[0]}")


def families_of(rows: list[Result]) -> Families:
    """The runs of the compared stages, by family."""
    measured = sorted(
        (row for row in rows if row["stage"] in COMPARED and row["family"] in ORDER),
        key=lambda row: (ORDER.index(row["family"]), row["seed"]),
    )
    return {key[0]: runs for key, runs in grouped(measured, lambda row: (row["family"],)).items()}


def seed_deviation(families: Families, value: Value) -> float | None:
    """Standard deviation over seeds, pooled over all families with several; None if there are none."""
    several = [[value(row) for row in runs] for runs in families.values() if len(runs) > 1]
    freedom = sum(len(values) - 1 for values in several)
    return (sum(variance(values) * (len(values) - 1) for values in several) / freedom) ** 0.5 if freedom else None
