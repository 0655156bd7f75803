"""The README's tables and figure, made only from results; parts without results are omitted."""

import pathlib
from statistics import fmean

from factlab.report import NOT_RUN, markdown, millions, settings, spread
from factlab.runs import Result, read_results

from realtext.comparisons import compared, equivalents, speed_of_learning
from realtext.figure import figure
from realtext.grading import IN_TEXT, NOT_IN_TEXT
from realtext.measures import (
    COMPARISONS,
    MEASURES,
    NAMES,
    ORDER,
    SQUAD,
    Families,
    bits,
    f1,
    families_of,
    match,
    nats,
    seed_deviation,
)
from realtext.prepare import BINS


def report(rows: list[Result], folder: pathlib.Path) -> str:
    """All tables, and the figure."""
    families = families_of(rows)
    parts: list[str] = []
    if families:
        figure(families, folder / "learning.png")
        parts.append("![held-out loss against tokens and arithmetic, facts by exposures](learning.png)")
        parts += headline(families) + repeated(families, read_results(folder / "results" / "again.json"))
        parts += compared(families) + equivalents(families) + speed_of_learning(families)
        parts += written(families) + by_exposures(families) + slots(families) + other_sets(families)
    parts += longer([row for row in rows if row["stage"] == "long"], families)
    parts += ablations([row for row in rows if row["stage"] == "ablations"], families)
    parts += large([row for row in rows if row["stage"] == "large"])
    parts += grid([row for row in rows if row["stage"] == "grid"])
    return "\n\n".join(parts) or NOT_RUN


def headline(families: Families) -> list[str]:
    """Sizes, and final losses on all texts and questions."""
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


def repeated(families: Families, again: dict[str, Result]) -> list[str]:
    """Runs trained twice with one seed: both values, and the spread over all seeds."""
    first = {row["name"]: row for runs in families.values() for row in runs}
    twice = [(first[name], row) for name, row in again.items() if name in first]
    if not twice:
        return []
    head = ("family", *(f"{name}{again}" for name in COMPARISONS for again in (", twice", ", seeds")))
    lines = []
    for rows in twice:
        cells = [f"`{rows[0]['family']}`"]
        for value in (MEASURES[name] for name in COMPARISONS):
            cells += [", ".join(f"{value(row):.3f}" for row in rows), spread(families[rows[0]["family"]], value, ".3f")]
        lines.append(cells)
    return ["Trained from scratch twice with the same seed (`results/again.json`):", markdown(head, lines)]


def written(families: Families) -> list[str]:
    """Exact match and F1 of generated answers."""
    groups = (IN_TEXT, NOT_IN_TEXT, *SQUAD)
    row = next(iter(families.values()))[0]
    counts = ", ".join(f"{row['written'][group]['questions']:,} {group}" for group in groups)
    head = ("family", *(f"{name}, {group}" for group in groups for name in ("exact match", "F1")))
    lines = [
        (f"`{name}`", *(spread(runs, value(group)) for group in groups for value in (match, f1)))
        for name, runs in families.items()
    ]
    return [f"Answers generated closed-book after four examples ({counts}):", markdown(head, lines)]


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
        f"EntityQuestions by how often subject and object occur together in the text ({counts}), nats per answer:",
        markdown(("family", *bins), by_nats),
        "The same, exact match:",
        markdown(("family", *bins), of(match)),
        "By relation, nats per answer (and the exact match of always giving the relation's commonest answer):",
        markdown(("relation", "questions", "commonest", *(f"`{name}`" for name in shown)), lines),
    ]


def slots(families: Families) -> list[str]:
    """How evenly the tables were read in the last part of training, and the loss with tables zeroed."""
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
        ["Slots read between the last two points of the curve, mean over layers:", markdown(head, lines)]
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
    return ["Multiple choice (most likely choice per byte), and programs, which are rare in the text:"] + [
        markdown(head, [chance, *lines])
    ]


def longer(rows: list[Result], families: Families) -> list[str]:
    """Runs of more epochs, beside those of the headline."""
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
    """The effect of each change to Memory+."""
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
    told = f" Standard deviation over seeds of the runs above: {noise}." if noise else ""
    return [
        f"Changes of `memory_plus`, {rows[0]['epochs']:.2f} epochs, one seed, with differences from the unchanged "
        f"model.{told}",
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
    """The learning rates that were tried."""
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
    head = ("model", "arithmetic per token", "parameters", "bits per byte, held out", "nats, answers in the text")
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
    picture = (
        "![held-out loss against tokens and arithmetic, facts by exposures](experiments/004_real_text/learning.png)"
    )
    return f"{picture}\n\n{markdown(head, lines)}"
