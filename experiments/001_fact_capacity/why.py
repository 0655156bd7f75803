"""Why one plain memory layer beat Memory+ of equal size: the variants of the stage `why`, and its tables."""

import itertools
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from factlab.report import Rows, grouped, markdown, spread
from factlab.runs import Result

GATE, LAYERS = "--model.memory.gate", "--model.memory.layers"
BASE = {GATE: "none", LAYERS: "2"}
"""Settings of the family `memory`, from which all variants are derived."""
OWN_TABLES = ("--model.memory.shared_table", "false", "--model.memory.num_keys", "181")
"""One table for each of two layers, together as large as the shared one."""
NARROW_START = ("--model.memory.value_init_scale", "1.0")
NO_QK_NORM = ("--model.memory.qk_norm", "false", "--model.memory.score_scale", "1.0")


class Design(NamedTuple):
    """The three differences between the two families."""

    layers: str
    gate: str
    table_lr: float


PLAIN, PLUS = Design("2", "none", 0.3), Design("1,3", "silu", 0.1)
ENDS = {PLAIN: "the plain layer", PLUS: "Memory+"}
STEPS = {"layers": "two layers share the table", "gate": "gate and projection", "table_lr": "table rate 0.1"}
"""The changes that lead from the plain layer to Memory+."""


class Variant(NamedTuple):
    """A model of the stage `why`."""

    design: Design
    settings: tuple[str, ...] = ()
    """Changes other than the three."""
    without: str = ""

    @property
    def all_settings(self) -> tuple[str, ...]:
        """All settings that differ from the family `memory`."""
        chosen = {GATE: self.design.gate, LAYERS: self.design.layers}
        changed = [pair for pair in chosen.items() if BASE[pair[0]] != pair[1]]
        return (*itertools.chain(*changed), *self.settings)

    @classmethod
    def of(cls, row: Result) -> "Variant":
        """The variant of a result."""
        pairs = BASE | dict(_pairs(row["settings"]))
        design = Design(pairs.pop(LAYERS), pairs.pop(GATE), row["table_lr"])
        kept = [pair for pair in pairs.items() if pair[0].startswith("--model.memory.")]
        return cls(design, tuple(itertools.chain(*kept)), row.get("without", ""))


def variants() -> Iterator[Variant]:
    """The eight designs, then single further changes from either end."""
    for choice in itertools.product((False, True), repeat=3):
        yield Variant(Design._make(PLUS[i] if taken else PLAIN[i] for i, taken in enumerate(choice)))
    yield Variant(PLAIN._replace(table_lr=1.0))
    yield Variant(PLUS._replace(table_lr=0.03))
    for layer in ("1", "3"):
        yield Variant(PLAIN._replace(layers=layer))
    for part in ("value_proj", "gate_proj"):
        yield Variant(PLAIN._replace(gate="silu"), without=part)
    yield Variant(PLAIN._replace(layers=PLUS.layers), OWN_TABLES)
    yield Variant(PLUS, OWN_TABLES)
    for end, change in itertools.product(ENDS, (NARROW_START, NO_QK_NORM)):
        yield Variant(end, change)


def tables(rows: Rows) -> list[str]:
    """Recall of the designs by table rate, the effect of each step, and the other changes."""
    found = {variant: runs for (variant,), runs in grouped(rows, lambda row: (Variant.of(row),)).items()}
    if not {Variant(PLAIN), Variant(PLUS)} <= set(found):
        return []
    exposures = next(iter(found.values()))[0]["exposures"]
    return [
        f"Why, {exposures:.0f} exposures: recall of each design by table rate:",
        _designs(found),
        "Effect of each step from the plain layer to Memory+, in points of recall:",
        _steps(found),
        "Single further changes, and their effect on the recall of the design:",
        _changes(found),
    ]


def _pairs(settings: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Options and their values."""
    return zip(*[iter(settings)] * 2, strict=True)


def _recall(runs: Rows) -> str:
    return spread(runs, lambda row: row["recall"])


def _mean(runs: Rows) -> float:
    return statistics.mean(row["recall"] for row in runs)


def _points(values: Iterable[float]) -> str:
    return ", ".join(f"{100 * value:+.1f}" for value in values)


def _designs(found: dict[Variant, Rows]) -> str:
    plain = [variant for variant in found if variant == Variant(variant.design)]
    rates = sorted({variant.design.table_lr for variant in plain})
    kinds = list(dict.fromkeys((variant.design.layers, variant.design.gate) for variant in plain))
    cell = lambda variant: _recall(found[variant]) if variant in found else ""
    lines = [
        (layers, gate, *(cell(Variant(Design(layers, gate, rate))) for rate in rates)) for layers, gate in sorted(kinds)
    ]
    return markdown(("blocks", "gate", *(f"{rate:g}" for rate in rates)), lines)


def _steps(found: dict[Variant, Rows]) -> str:
    lines = []
    for step, words in STEPS.items():
        before = [variant.design for variant in found if getattr(variant.design, step) == getattr(PLAIN, step)]
        pairs = {
            design: (found[Variant(design)], found[Variant(after)])
            for design in dict.fromkeys(before)
            if Variant(after := design._replace(**{step: getattr(PLUS, step)})) in found and Variant(design) in found
        }
        gain = {design: _mean(after) - _mean(runs) for design, (runs, after) in pairs.items()}
        last = PLUS._replace(**{step: getattr(PLAIN, step)})
        ends = [_points([gain[design]]) if design in gain else "" for design in (PLAIN, last)]
        lines.append((words, *ends, _points([statistics.mean(gain.values())]), _points(sorted(gain.values()))))
    whole = _points([_mean(found[Variant(PLUS)]) - _mean(found[Variant(PLAIN)])])
    head = ("step", "taken first", "taken last", "mean", "of every pair of designs")
    return markdown(head, [*lines, ("all three", whole, whole, whole, "")])


def _changes(found: dict[Variant, Rows]) -> str:
    lines = []
    for variant, runs in found.items():
        base = found.get(Variant(variant.design))
        if base is None or base is runs:
            continue
        words = [f"`{name.removeprefix('--model.')}` {value}" for name, value in _pairs(variant.settings)]
        words += [f"no {variant.without}"] if variant.without else []
        layers, gate, rate = variant.design
        design = f"blocks {layers}, gate {gate}, {rate:g}"
        lines.append((design, ", ".join(words), _recall(runs), _points([_mean(runs) - _mean(base)])))
    return markdown(("design", "change", "recall", "points"), lines)
