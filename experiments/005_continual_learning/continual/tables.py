"""The README's tables, made only from results: the chosen settings, and what they learn and forget."""

import pathlib
from collections.abc import Iterable
from typing import Any

from factlab.report import NOT_RUN, grouped, markdown, spread
from factlab.runs import Result

LEARNED = 0.70
"""Share of untaught wordings that must be answered for a setting to be compared."""
TRIED = ("grid", "between", "closer")
"""Stages that try settings."""

MEASURES = (
    "method and rate",
    "new facts, paraphrases",
    "as learned",
    "old facts lost",
    "bits per byte",
    "rows changed",
)
"""Columns of measures that every run has."""


def chosen(results: Iterable[Result]) -> list[Result]:
    """For each method, the setting that forgets least among those that learn enough, else the one that learns most."""
    best = []
    for rows in grouped((row for row in results if row["stage"] in TRIED), lambda row: (row["family"],)).values():
        enough = [row for row in rows if row["paraphrases"] >= LEARNED]
        best.append(
            min(enough, key=lambda row: row["old_lost"])
            if enough
            else max(rows, key=lambda row: (row["paraphrases"], row["as_learned"]))
        )
    return best


def report(rows: list[Result], folder: pathlib.Path) -> str:
    """The headline, the larger base, CounterFact, parts and patches, and the grid."""
    del folder  # no picture
    picked = {name_of(row): row for row in chosen(rows)}
    if not picked:
        return NOT_RUN
    of = lambda how, larger=False: [
        row for row in rows if row["how"] == how and bool(row.get("larger")) == larger and name_of(row) in picked
    ]
    parts = [_headline(of("together")), _larger(of("together", True)), _edits(of("edits"))]
    parts += [_parts(of("in_parts"), of("merged")), _grid(rows)]
    return "\n\n".join(part for part in parts if part)


def name_of(row: Result) -> str:
    """A method with its settings."""
    told = [row["family"].replace("_", " ")]
    told += [f"t {row['rows_given']}"] if row["rows_given"] else []
    told += [f"rank {row['rank']}"] if row["rank"] else []
    told += [row["optimizer"].replace("_", " ")] if row["family"] not in ("lora", "full") else []
    return ", ".join([*told, f"{row['lr']:g}"])


def _headline(rows: list[Result]) -> str:
    head = (*MEASURES, "numbers stored", "seconds a fact")
    lines = [
        (
            name,
            spread(runs, lambda row: row["paraphrases"]),
            spread(runs, lambda row: row["as_learned"]),
            spread(runs, lambda row: row["old_lost"]),
            spread(runs, lambda row: row["bits_more"], "+.2%"),
            spread(runs, lambda row: row["rows"], ",.0f"),
            spread(runs, lambda row: row["stored"], ",.0f"),
            spread(runs, lambda row: row["seconds_a_fact"], ".3f"),
        )
        for (name,), runs in grouped(rows, lambda row: (name_of(row),)).items()
    ]
    right = [
        f"{row['old_right']:,} of {row['old_asked']:,}"
        for _, (row, *_) in grouped(rows, lambda row: (row["seed"],)).items()
    ]
    told = f"{rows[0]['facts']:,} new facts. Old facts that the bases answer: {'; '.join(right)}."
    return f"{told}\n\n{markdown(head, lines)}"


def _larger(rows: list[Result]) -> str:
    return f"The larger base:\n\n{_headline(rows)}" if rows else ""


def _edits(rows: list[Result]) -> str:
    if not rows:
        return ""
    head = ("CounterFact", "efficacy", "paraphrase", "neighbourhood", "score", "old facts lost", "bits per byte")
    names = ("efficacy", "paraphrase", "neighbourhood", "score")
    lines = [("the base", *(f"{rows[0][f'{name}_before']:.1%}" for name in names), "", "")]
    for row in rows:
        lost = f"{row['old_lost']:.1%}", f"{row['bits_more']:+.2%}"
        lines.append((name_of(row), *(f"{row[name]:.1%}" for name in names), *lost))
    return markdown(head, lines)


def _parts(in_parts: list[Result], merged: list[Result]) -> str:
    if not in_parts:
        return ""
    head = ("in parts", "new facts, paraphrases", "the first part", "the last part", "old facts lost", "patches alone")
    head += ("merged", "old facts lost, merged")
    sums = {name_of(row): row for row in merged}
    lines = []
    for row in in_parts:
        by_part, total = row["paraphrases_by_part"], sums.get(name_of(row))
        after = ("", "", "")
        if total:
            after = tuple(f"{total[name]:.1%}" for name in ("paraphrases_alone", "paraphrases", "old_lost"))
        shares = (row["paraphrases"], by_part[0], by_part[-1], row["old_lost"])
        lines.append((name_of(row), *(f"{share:.1%}" for share in shares), *after))
    return markdown(head, lines)


def _grid(rows: list[Result]) -> str:
    lines = [
        (
            name_of(row),
            f"{row['paraphrases']:.1%}",
            f"{row['as_learned']:.1%}",
            f"{row['old_lost']:.1%}",
            f"{row['bits_more']:+.2%}",
            f"{row['rows']:,}",
        )
        for row in sorted((row for row in rows if row["stage"] in TRIED), key=_place)
    ]
    return f"All settings that were tried:\n\n{markdown(MEASURES, lines)}"


def _place(row: Result) -> tuple[Any, ...]:
    return row["family"], row["rank"], row["optimizer"], row["rows_given"], row["lr"]
