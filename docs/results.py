"""Charts and tables of the pages, made from the committed results of experiments/ whenever the site is built."""

import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

from charts import Bar, Point, bars, curve
from svg import BLUE, GREEN, ORANGE

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
Row = dict[str, Any]

FAMILIES = {
    "dense_x1": ("dense", BLUE),
    "dense_x2": ("dense, twice the arithmetic", BLUE),
    "dense_x4": ("dense, four times the arithmetic", BLUE),
    "moe": ("mixture of 21 experts", ORANGE),
    "peer": ("PEER, 32,400 experts", GREEN),
    "memory": ("one memory layer, 65,536 slots", GREEN),
    "memory_plus_small": ("Memory+, 16,384 slots", GREEN),
    "memory_plus": ("Memory+, 65,536 slots", GREEN),
    "memory_plus_large": ("Memory+, 262,144 slots", GREEN),
}
"""How the pages call the families of experiments 001 and 002, in the order in which they show them."""

PAPER = {
    "dense": ("dense_x1", "1.3", "1.262", 7.76, 32.64),
    "MoE": ("moe", "3.545", "3.546", 8.14, 31.46),
    "PEER": ("peer", "3.646", "3.646", 12.33, 42.46),
    "Memory, 1 million slots": ("memory", "3.377", "3.378", 9.83, 39.47),
    "Memory+, 1 million": ("memory_plus", "3.377", "3.368", 13.68, 42.89),
    "Memory+, 4 million": ("memory_plus_large", "9.823", "9.823", 14.43, 51.18),
    "Memory+, 16 million": ("", "35.618", "35.618", 20.14, 58.67),
    "Memory+, 64 million": ("", "138.748", "138.748", 20.78, 62.14),
}
"""Table 1 of arXiv:2412.09764, models of 1.3b trained on 1T tokens: the family of experiments 001 and 002 in the
model's place, billions of parameters in the paper and of the preset (counted by tests/models/test_counts.py), exact
answers of NaturalQuestions and the F1 of TriviaQA."""


def facts_curve() -> str:
    """Recall against arithmetic, experiment 001: dense models of growing width against Memory+ with growing tables."""
    groups, size = _families("001_fact_capacity", "recall")
    arithmetic = {
        name: rows[0]["flops_per_token"] / groups["dense_x1"][0]["flops_per_token"] for name, rows in groups.items()
    }

    def point(family: str, words: str, side: str) -> Point:
        low, mean, high = _range(groups[family], "recall")
        return Point(arithmetic[family], low, mean, high, f"{words}{mean:.1%}", side)

    lines = {
        BLUE: [
            point("dense_x1", "dense ", "below"),
            point("dense_x2", "", "below"),
            point("dense_x4", "dense, wider ", "above"),
        ],
        GREEN: [
            point("memory_plus_small", "memory, 16,384 rows ", "left"),
            point("memory_plus", "65,536 rows ", "left"),
            point("memory_plus_large", "262,144 rows ", "right"),
        ],
    }
    return curve(
        f"Share of {size:,} facts that a small model recalls, against its arithmetic for each token",
        lines,
        x=("arithmetic for each token, of the small dense model's", 0.25, 5, {0.5: "½", 1: "1 x", 2: "2 x", 4: "4 x"}),
        y=(f"share of {size:,} facts recalled", 1.05, _percents(0, 25, 50, 75, 100)),
    )


def facts_bars() -> str:
    """Recall of every family of experiment 001, with the range of the seeds."""
    groups, size = _families("001_fact_capacity", "recall")
    members = [_bar(name, groups[name], "recall") for name in FAMILIES if name in groups]
    return bars(f"Recall of {size:,} generated facts by model", {"": members}, highest=1)


def real_facts_bars() -> str:
    """Exact match of every family of experiment 002, at both numbers of facts."""
    groups: dict[str, list[Bar]] = {}
    for count in sorted({row["facts"] for row in _runs("002_real_facts")}):
        found, _ = _families("002_real_facts", "exact_match", count)
        members = [_bar(name, found[name], "exact_match") for name in FAMILIES if name in found]
        groups[f"{count:,} facts"] = members
    return bars("Exact answers to questions about real facts that training never asked", groups, highest=1)


def paper_table() -> str:
    """The paper's figures beside those of the presets and of the experiments."""
    recall, _ = _families("001_fact_capacity", "recall")
    exact, _ = _families("002_real_facts", "exact_match", 120_000)
    head = ("model", "parameters", "preset of memjax", "NQ", "TriviaQA", "001: invented facts", "002: real facts")
    rows = [head, ("---",) * len(head)]
    for name, (family, published, preset, nq, trivia) in PAPER.items():
        ours = [
            f"{_range(groups[family], key)[1]:.1%}" if family in groups else ""
            for groups, key in ((recall, "recall"), (exact, "exact_match"))
        ]
        rows.append((name, f"{published} b", f"{preset} b", f"{nq}", f"{trivia}", *ours))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def operation_bars() -> str:
    """Milliseconds of the operations by implementation, each group to its own scale."""
    rows = _bench("ops")["rows"]
    wide = "1,048,576 x 1024"
    groups = {
        "embedding bag": [("embedding_bag", wide, name) for name in ("triton", "xla", "torch")],
        "product-key search, 1,024 sub-keys a side": [
            ("product_key_search", "n = 1024, top 32", "triton"),
            ("product_key_search", "n = 1024, top 32", "xla"),
            ("top-k alone", "131,072 rows of 1024", "torch"),
        ],
        "table update, row-wise Adam": [
            ("row_update rowwise_adam", wide, "triton"),
            ("row_update rowwise_adam", wide, "xla"),
            ("AdamW on the whole table", wide, "torch fused"),
        ],
        "memory layer: forward, backward, update": [
            ("memory layer, forward + backward + update", wide, "triton"),
            ("memory layer, forward + backward + update", wide, "xla"),
        ],
    }
    names = {"triton": ("memjax, Triton", GREEN), "xla": ("memjax, XLA", BLUE), "torch": ("PyTorch", ORANGE)}
    others = {"top-k alone": "PyTorch, top-k alone", "AdamW on the whole table": "PyTorch, AdamW on all rows"}
    shown = {}
    for heading, wanted in groups.items():
        members = []
        for operation, shape, implementation in wanted:
            row = _measured(rows, operation, shape, implementation)
            label, color = names[implementation.split()[0]]
            members.append(Bar(others.get(operation, label), row["ms"], color, f"{row['ms']:.3f} ms"))
        shown[heading] = members
    return bars("Milliseconds of the operations on one H200, less is better", shown)


def step_bars() -> str:
    """Tokens per second of whole training steps."""
    speed = {row["case"]: row["tokens/s"] for row in _bench("step")["rows"] if "tokens/s" in row}
    cases = {
        "dense": ("dense, bfloat16 parameters", BLUE),
        "dense, compiled PyTorch": ("PyTorch dense, bfloat16 parameters", ORANGE),
        "Memory+, 1 million slots": ("Memory+, 1,048,576 slots, bfloat16 parameters", GREEN),
        "Memory+, 16 million slots": ("Memory+, 16,777,216 slots", GREEN),
        "Memory+, 48 million slots": ("Memory+, 47,997,184 slots", GREEN),
    }
    members = [Bar(name, speed[case], color, f"{speed[case]:,}") for name, (case, color) in cases.items()]
    return bars("Tokens per second of training steps of 373m models on one H200, more is better", {"": members})


def generation_bars() -> str:
    """Milliseconds a token of generation, beside transformers."""
    names = {"dense": ("memjax", GREEN), "transformers, static cache": ("transformers, compiled", ORANGE)}
    rows = [row for row in _bench("inference")["rows"] if row["prompt"] == 512 and row["model"] in names]
    groups: dict[str, list[Bar]] = {}
    for row in sorted(rows, key=lambda row: (row["batch"], list(names).index(row["model"]))):
        label, color = names[row["model"]]
        bar = Bar(label, row["ms a token"], color, f"{row['ms a token']:.3f} ms")
        groups.setdefault(f"batch {row['batch']}", []).append(bar)
    return bars("Milliseconds a token for the whole batch, dense 373m model on one H200, less is better", groups)


def _percents(*values: int) -> dict[float, str]:
    return {value / 100: f"{value}%" for value in values}


def _bench(name: str) -> Any:
    return json.loads((EXPERIMENTS / f"bench/results/{name}-nvidia-h200.json").read_text(encoding="utf-8"))


def _measured(rows: Iterable[Row], operation: str, shape: str, implementation: str) -> Row:
    # The shape of a row update names its temporary memory, too.
    (row,) = [
        row
        for row in rows
        if (row["operation"], row["implementation"]) == (operation, implementation)
        and row["shape"] in (shape, f"{shape}, {row['shape'].rpartition(', ')[2]}")
        and row["indices"] in ("", "uniform")
    ]
    return row


def _runs(experiment: str) -> list[Row]:
    rows = json.loads((EXPERIMENTS / experiment / "results/full.json").read_text(encoding="utf-8"))["runs"]
    return [row for row in rows if row["stage"] == "full"]


def _families(experiment: str, metric: str, facts: int | None = None) -> tuple[dict[str, list[Row]], int]:
    """The runs of an experiment that have the metric, by family, and how many facts there are."""
    groups: dict[str, list[Row]] = {}
    for row in _runs(experiment):
        if metric in row and facts in (None, row["facts"]):
            groups.setdefault(row["family"], []).append(row)
    return groups, next(iter(groups.values()))[0]["facts"]


def _range(rows: list[Row], metric: str) -> tuple[float, float, float]:
    values = [row[metric] for row in rows]
    return min(values), statistics.mean(values), max(values)


def _bar(family: str, rows: list[Row], metric: str) -> Bar:
    label, color = FAMILIES[family]
    low, mean, high = _range(rows, metric)
    return Bar(label, mean, color, f"{mean:.1%}", low, high)
