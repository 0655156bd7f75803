"""README's tables and figure, from the results alone; a part whose runs are not there yet is left out."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, variance

import numpy as np
from factlab.report import NOT_RUN, draw, grouped, markdown, millions, settings, spread
from factlab.runs import Result

from realtext.grading import IN_TEXT, NOT_IN_TEXT
from realtext.prepare import BINS

Value = Callable[[Result], float]
Families = dict[str, list[Result]]

COMPARED = ("full", "134m", "seeds")
"""Stages whose runs read the same text equally often."""
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
"""The dense models of both sizes, which are one series: the one of 134m has 4.1 times the arithmetic of dense_x1."""
DRAWS = 2000
"""Random draws of an interval."""


def bits(text: str) -> Value:
    """Bits per byte of a text at the end."""
    return lambda row: row["curve"][-1]["bits_per_byte"][text]


def nats(group: str) -> Value:
    """Negative log-likelihood of the answers of a group of questions at the end."""
    return lambda row: row["curve"][-1]["answers"][group]


def match(group: str) -> Value:
    """Exact match of written answers."""
    return lambda row: row["written"][group]["exact_match"]


def f1(group: str) -> Value:
    """F1 of written answers."""
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


def report(rows: list[Result], folder: pathlib.Path) -> str:
    """All tables, and the figure."""
    families = families_of(rows)
    parts: list[str] = []
    if families:
        figure(families, folder / "learning.png")
        parts.append("![loss against tokens and arithmetic, answers by exposures](learning.png)")
        parts += headline(families) + compared(families) + equivalents(families) + speed_of_learning(families)
        parts += written(families) + by_exposures(families) + slots(families) + other_sets(families)
    parts += longer([row for row in rows if row["stage"] == "long"], families)
    parts += ablations([row for row in rows if row["stage"] == "ablations"], families)
    parts += large([row for row in rows if row["stage"] == "large"])
    parts += grid([row for row in rows if row["stage"] == "grid"])
    return "\n\n".join(parts) or NOT_RUN


def families_of(rows: list[Result]) -> Families:
    """The runs that read the same text equally often, by family."""
    measured = sorted(
        (row for row in rows if row["stage"] in COMPARED and row["family"] in ORDER),
        key=lambda row: (ORDER.index(row["family"]), row["seed"]),
    )
    return {key[0]: runs for key, runs in grouped(measured, lambda row: (row["family"],)).items()}


def headline(families: Families) -> list[str]:
    """Sizes, and what every text and question costs in the end."""
    head = ("family", "FLOPs per token", "dense", "tables, experts", "lr, of tables", *MEASURES)
    lines = []
    for name, runs in families.items():
        row, parameters = runs[0], runs[0]["parameters"]
        lines.append(
            (
                f"`{name}`",
                millions(row["flops_per_token"]),
                millions(parameters["dense"]),
                millions(parameters["table"] + parameters["experts"]),
                f"{row['lr']:g}" + (f", {row['table_lr']:g}" if row["table_lr"] else ""),
                *(spread(runs, value, ".3f") for value in MEASURES.values()),
            )
        )
    row = next(iter(families.values()))[0]
    return [f"{row['tokens'] / 1e6:.0f} M tokens, {row['epochs']:.2f} epochs:", markdown(head, lines)]


def compared(families: Families) -> list[str]:
    """Memory+ against every other family of its size."""
    found = []
    for base in ("memory_plus", "134m_memory_plus"):
        others = [name for name in families if name != base and name.startswith("134m") == base.startswith("134m")]
        if base == "memory_plus" and "134m_dense" in families:
            others.append("134m_dense")
        if base not in families or not others:
            continue
        lines = [
            (
                f"`{name}`",
                *(_difference(families, base, name, MEASURES[measure]) for measure in COMPARISONS),
            )
            for name in others
        ]
        found += [
            f"`{base}` less the other, with twice the standard error by the spread of the seeds (below zero: `{base}` "
            "is better):",
            markdown(("against", *COMPARISONS), lines),
        ]
    return found


def _difference(families: Families, one: str, other: str, value: Value) -> str:
    values = [[value(row) for row in families[name]] for name in (one, other)]
    difference = fmean(values[0]) - fmean(values[1])
    deviation = seed_deviation(families, value)
    if deviation is None:
        return f"{difference:+.3f}"
    doubt = 2 * deviation * (1 / len(values[0]) + 1 / len(values[1])) ** 0.5
    verdict = "equal" if abs(difference) <= doubt else "better" if difference < 0 else "worse"
    return f"{difference:+.3f} ± {doubt:.3f}, {verdict}"


def seed_deviation(families: Families, value: Value) -> float | None:
    """Standard deviation of a run's value over seeds, of all families that have several; None without one."""
    several = [[value(row) for row in runs] for runs in families.values() if len(runs) > 1]
    freedom = sum(len(values) - 1 for values in several)
    return (sum(variance(values) * (len(values) - 1) for values in several) / freedom) ** 0.5 if freedom else None


def equivalents(families: Families) -> list[str]:
    """Which dense model every other one equals, by a line through the dense ones over the logarithm of their size."""
    dense = [name for name in DENSE if name in families]
    others = [name for name in families if name not in DENSE]
    if len(dense) < 2 or not others:
        return []
    lines = []
    for name in others:
        cells = [f"`{name}`"]
        for measure in ("bits per byte, held out", f"nats, {IN_TEXT}", f"nats, {SQUAD[0]}"):
            sizes = (_flops, _dense_parameters)
            cells += [equivalent(families, dense, name, MEASURES[measure], size) for size in sizes]
        lines.append(cells)
    head = ("family", "FLOPs, held out", "parameters, held out")
    head += ("FLOPs, answers in the text", "parameters, answers in the text", "FLOPs, SQuAD", "parameters, SQuAD")
    shown = ", ".join(f"`{name}`" for name in dense)
    return [
        "The dense model of equal loss, as a multiple of the family's own FLOPs per token and dense parameters: a line "
        f"through {shown} over the logarithm of their size, read off at the family's loss; 90 % intervals by the "
        "spread of the seeds. In brackets where it lies outside the dense models that were trained.",
        markdown(head, lines),
    ]


def _flops(row: Result) -> float:
    return row["flops_per_token"]


def _dense_parameters(row: Result) -> float:
    return row["parameters"]["dense"]


def equivalent(families: Families, dense: Sequence[str], name: str, value: Value, size: Value) -> str:
    """The size of the dense model with the family's value, over the family's own size, with its interval."""
    sizes = np.log2([size(families[one][0]) for one in dense])
    means = lambda names: np.array([fmean(value(row) for row in families[one]) for one in names])
    points, own = means(dense), means([name])[0]
    at = lambda points, own: _crossing(sizes, points, own) - np.log2(size(families[name][0]))
    middle = at(points, own)
    outside = not sizes.min() <= middle + np.log2(size(families[name][0])) <= sizes.max()
    shown = f"{2**middle:.2f}"
    if deviation := seed_deviation(families, value):
        rng = np.random.default_rng(0)
        errors = lambda names: deviation / np.sqrt([len(families[one]) for one in names])
        drawn = [
            at(points + rng.normal(size=len(dense)) * errors(dense), own + rng.normal() * errors([name])[0])
            for _ in range(DRAWS)
        ]
        low, high = np.quantile(drawn, (0.05, 0.95))
        shown += f" ({2**low:.2f} to {2**high:.2f})"
    return f"[{shown}]" if outside else shown


def _crossing(sizes: np.ndarray, points: np.ndarray, own: float) -> float:
    """Where the line through the points has the value."""
    slope, intercept = np.polyfit(sizes, points, 1)
    # A line that does not fall has no such place; a far one is as good as none.
    return (
        float(np.clip((own - intercept) / slope, sizes.min() - 10, sizes.max() + 10)) if slope < 0 else sizes.max() + 10
    )


def speed_of_learning(families: Families) -> list[str]:
    """Tokens after which a family is where dense_x1 ends."""
    if "dense_x1" not in families:
        return []
    measures = {
        "bits per byte, held out": lambda point: point["bits_per_byte"]["held_out"],
        f"nats, {IN_TEXT}": lambda point: point["answers"][IN_TEXT],
        f"nats, {SQUAD[0]}": lambda point: point["answers"][SQUAD[0]],
    }
    lines = []
    for name, runs in families.items():
        cells = [f"`{name}`"]
        for value in measures.values():
            wanted = fmean(value(row["curve"][-1]) for row in families["dense_x1"])
            reached = [_reached(row, value, wanted) for row in runs]
            share = None if None in reached else fmean(tokens for tokens in reached if tokens) / runs[0]["tokens"]
            cells.append("not reached" if share is None else f"{share:.0%}")
        lines.append(cells)
    return [
        "Share of its tokens after which a family is where `dense_x1` ends (mean over seeds; points of the curve "
        "joined by lines):",
        markdown(("family", *measures), lines),
    ]


def _reached(row: Result, value: Callable[[Result], float], wanted: float) -> float | None:
    before: tuple[float, float] | None = None
    for point in row["curve"]:
        now = (point["tokens"], value(point))
        if now[1] <= wanted:
            if before is None or before[1] == now[1]:
                return now[0]
            return before[0] + (now[0] - before[0]) * (before[1] - wanted) / (before[1] - now[1])
        before = now
    return None


def written(families: Families) -> list[str]:
    """Exact match and F1 of written answers."""
    groups = (IN_TEXT, NOT_IN_TEXT, *SQUAD)
    row = next(iter(families.values()))[0]
    counts = ", ".join(f"{row['written'][group]['questions']:,} {group}" for group in groups)
    head = ("family", *(f"{name}, {group}" for group in groups for name in ("exact match", "F1")))
    lines = [
        (f"`{name}`", *(spread(runs, value(group)) for group in groups for value in (match, f1)))
        for name, runs in families.items()
    ]
    return [f"Answers written closed-book after four examples ({counts}):", markdown(head, lines)]


def by_exposures(families: Families) -> list[str]:
    """EntityQuestions by how often the text names subject and object together."""
    row = next(iter(families.values()))[0]
    bins = [name for name in BINS if name in row["written"]]
    counts = ", ".join(f"{row['written'][name]['questions']:,} {name}" for name in bins)
    of = lambda value: [(f"`{name}`", *(spread(runs, value(one)) for one in bins)) for name, runs in families.items()]
    by_nats = [(f"`{name}`", *(spread(runs, nats(one), ".2f") for one in bins)) for name, runs in families.items()]
    relations = sorted(row["by_relation"])
    shown = [
        name for name in ("dense_x1", "dense_x2", "memory_plus", "134m_dense", "134m_memory_plus") if name in families
    ]
    relation = lambda one, key: lambda row: row["by_relation"][one][key]
    lines = [
        (
            one,
            f"{row['by_relation'][one]['questions']:,}",
            f"{row['by_relation'][one]['commonest_answer']:.1%}",
            *(f"{spread(families[name], relation(one, 'nats'), '.2f')}" for name in shown),
        )
        for one in relations
    ]
    return [
        f"EntityQuestions by how often subject and object stand together in the text ({counts}), nats of an answer:",
        markdown(("family", *bins), by_nats),
        "The same, exact match:",
        markdown(("family", *bins), of(match)),
        "By relation, nats of an answer (and the exact match of always giving the relation's commonest answer):",
        markdown(("relation", "questions", "commonest", *(f"`{name}`" for name in shown)), lines),
    ]


def slots(families: Families) -> list[str]:
    """How evenly the tables were read in the last part of the training, and what they hold."""
    lines = []
    for name, runs in families.items():
        if "zeroed" not in runs[0]:
            continue
        layers = runs[0]["curve"][-1]["slots"]
        of = lambda field: lambda row: fmean(layer[field] for layer in row["curve"][-1]["slots"].values())
        zeroed = lambda row: row["zeroed"]["bits_per_byte"]["held_out"]
        lines.append(
            (
                f"`{name}`",
                str(len(layers)),
                spread(runs, of("used_fraction")),
                spread(runs, of("effective_fraction")),
                spread(runs, of("dead_fraction")),
                spread(runs, bits("held_out"), ".3f"),
                spread(runs, zeroed, ".3f"),
            )
        )
    head = ("family", "layers", "slots read", "effective", "dead", "bits per byte, held out", "tables zeroed")
    return (
        ["Slots between the last two points of the curve, mean over the layers:", markdown(head, lines)]
        if lines
        else []
    )


def other_sets(families: Families) -> list[str]:
    """Multiple choice, and programs."""
    row = next(iter(families.values()))[0]
    names = list(row["choices"])
    accuracy = lambda one: lambda row: row["choices"][one]["accuracy_by_byte"]
    lines = [
        (f"`{name}`", *(spread(runs, accuracy(one)) for one in names), spread(runs, bits("code"), ".3f"))
        for name, runs in families.items()
    ]
    chance = ("chance", *(f"{row['choices'][one]['chance']:.1%}" for one in names), "")
    head = ("family", *(f"{one} ({row['choices'][one]['questions']:,})" for one in names), "bits per byte, code")
    return ["Multiple choice (likeliest choice for its bytes), and programs, which the text hardly has:"] + [
        markdown(head, [chance, *lines])
    ]


def longer(rows: list[Result], families: Families) -> list[str]:
    """The runs of more epochs beside those of the headline."""
    if not rows:
        return []
    lines = []
    for row in sorted(rows, key=lambda row: ORDER.index(row["family"])):
        for runs in ([families[row["family"]]] if row["family"] in families else []) + [[row]]:
            cells = (spread(runs, value, ".3f") for value in MEASURES.values())
            lines.append((f"`{row['family']}`", f"{runs[0]['epochs']:.2f}", *cells, spread(runs, match(IN_TEXT))))
    head = ("family", "epochs", *MEASURES, f"exact match, {IN_TEXT}")
    return ["More epochs, one seed:", markdown(head, lines)]


def ablations(rows: list[Result], families: Families) -> list[str]:
    """What each change of Memory+ does."""
    if not rows:
        return []
    base = next((row for row in rows if not row["settings"]), None)
    names = COMPARISONS
    lines = []
    for row in rows:
        cells = []
        for measure in names:
            value = MEASURES[measure]
            change = f" ({value(row) - value(base):+.3f})" if base and row is not base else ""
            cells.append(f"{value(row):.3f}{change}")
        read = fmean(layer["used_fraction"] for layer in row["curve"][-1]["slots"].values())
        lines.append(
            (settings(row | {"perfect_address": False}), *cells, f"{read:.1%}", f"{row['tokens_per_second']:,}")
        )
    spreads = [(name, seed_deviation(families, MEASURES[name])) for name in names]
    noise = ", ".join(f"{name} {deviation:.4f}" for name, deviation in spreads if deviation is not None)
    told = f" The standard deviation over the seeds of the runs above: {noise}." if noise else ""
    return [
        f"Changes of `memory_plus`, {rows[0]['epochs']:.2f} epochs, one seed, and the difference to none.{told}",
        markdown(("change", *names, "slots read", "tokens/s"), lines),
    ]


def large(rows: list[Result]) -> list[str]:
    """Whether large models train, and how fast."""
    if not rows:
        return []
    lines = [
        (
            f"`{row['family']}`",
            millions(row["parameters"]["total"]),
            f"{row['steps']}",
            " → ".join("-" if point["loss"] is None else f"{point['loss']:.2f}" for point in row["curve"]),
            f"{row['tokens_per_second']:,}",
            f"{row['flops_utilization']:.1%}" if row["flops_utilization"] else "",
        )
        for row in rows
    ]
    head = ("family", "parameters", "steps", "loss", "tokens/s", "MFU")
    return ["A few steps of the large presets, 4 rows of 4,096 tokens each:", markdown(head, lines)]


def grid(rows: list[Result]) -> list[str]:
    """The rates that were tried."""
    if not rows:
        return []
    lines = [
        (
            f"`{row['family']}`",
            f"{row['lr']:g}",
            f"{row['table_lr']:g}" if row["table_lr"] else "",
            *(f"{value(row):.3f}" for value in (bits("held_out"), nats(IN_TEXT))),
        )
        for row in rows
    ]
    head = ("family", "lr", "of tables", "bits per byte, held out", f"nats, {IN_TEXT}")
    return [f"Grid, {rows[0]['epochs']:.2f} epochs, one seed:", markdown(head, lines)]


def summary(rows: list[Result]) -> str:
    """The table of the repository's README; nothing without results."""
    families = families_of(rows)
    if "dense_x1" not in families:
        return NOT_RUN
    head = ("model", "arithmetic a token", "parameters", "bits per byte, held out", "nats, answers in the text")
    head += ("nats, facts of 4 or more paragraphs",)
    unit = families["dense_x1"][0]["flops_per_token"]
    lines = [
        (
            NAMES[name],
            f"{runs[0]['flops_per_token'] / unit:.2f}",
            millions(runs[0]["parameters"]["total"]),
            spread(runs, bits("held_out"), ".3f"),
            spread(runs, nats(IN_TEXT), ".2f"),
            spread(runs, nats(BINS[-1]), ".2f"),
        )
        for name, runs in families.items()
    ]
    picture = "![loss against tokens and arithmetic, answers by exposures](experiments/004_real_text/learning.png)"
    return f"{picture}\n\n{markdown(head, lines)}"


def figure(families: Families, path: pathlib.Path) -> None:
    """Held-out loss against tokens and arithmetic, and what answers cost by exposures."""
    by_tokens, by_flops, by_bin = {}, {}, {}
    for name, runs in families.items():
        points = list(zip(*[run["curve"] for run in runs], strict=True))
        values = [[point["bits_per_byte"]["held_out"] for point in each] for each in points]
        by_tokens[name] = [(each[0]["tokens"], some) for each, some in zip(points, values, strict=True)]
        by_flops[name] = [(each[0]["flops"], some) for each, some in zip(points, values, strict=True)]
        bins: Iterable[str] = (one for one in BINS if one in runs[0]["written"])
        by_bin[name] = [(one.replace(", ", ",\n"), [nats(one)(run) for run in runs]) for one in bins]
    panels = [
        ("Articles that training never shows", "bits per byte", by_tokens),
        ("The same against arithmetic", "bits per byte", by_flops),
        ("Facts by how often the text tells them", "nats of the answer", by_bin),
    ]
    draw(path, panels, ("tokens", "training FLOPs", "subject and object together"))
