"""Merge several patches for one model."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from memjax.errors import CheckpointError
from memjax.runs.patches.patch import Patch, RowChange
from memjax.runs.patches.tables import named_rows

Rule = Literal["refuse", "sum", "first", "last"]


def merge(patches: Sequence[tuple[str, Patch]], *, conflicts: Rule = "refuse") -> Patch:
    """Combines several patches into one.

    Args:
        patches: patches for the same base, each with a label for messages.
        conflicts: what to do with rows that several patches change. refuse: raise an error that names them; sum: the
            old row plus all changes; first and last: the row of the first or last patch.

    Raises:
        CheckpointError: patches are for different models, one is given twice, they change the same rows and `conflicts`
            is refuse, or sums of rows are not finite.
    """
    first_label, first = patches[0]
    for label, patch in patches[1:]:
        if patch.base != first.base:
            bases = f"{first.base[:16]} and {patch.base[:16]}"
            raise CheckpointError(f"{first_label} and {label} were made for different models: {bases}")
    labels: dict[str, str] = {}
    for label, patch in patches:
        if patch.identity in labels:
            raise CheckpointError(f"{labels[patch.identity]} and {label} are one and the same patch; leave one out")
        labels[patch.identity] = label
    if conflicts == "refuse" and (found := [*_conflicts(patches)]):
        rule = "choose a rule for such rows (conflicts sum, first or last), or learn the facts of all together: "
        raise CheckpointError("\n".join([*found, f"{rule}`python -m memjax.learn RUN PATCHES --out PATCH`"]))
    names = dict.fromkeys(name for _, patch in patches for name in patch.tables)
    tables = {}
    for name in names:
        parts = [(label, patch.tables[name]) for label, patch in patches if name in patch.tables]
        tables[name] = _merged(name, parts, conflicts)
    sources = [{"patch": label, "identity": patch.identity, "notes": dict(patch.notes)} for label, patch in patches]
    return Patch(first.base, tables, {"made_by": "merge", "conflicts": conflicts, "sources": sources})


def _conflicts(patches: Sequence[tuple[str, Patch]]) -> Iterator[str]:
    for (first_label, first), (label, patch) in itertools.combinations(patches, 2):
        for name, rows in first.shared_rows(patch).items():
            yield f"{first_label} and {label} both change {named_rows(name, rows)}"


def _merged(name: str, parts: Sequence[tuple[str, RowChange]], conflicts: Rule) -> RowChange:
    label, like = parts[0]
    for other_label, part in parts[1:]:
        if (part.num_slots, part.new.shape[1], part.new.dtype) != (like.num_slots, like.new.shape[1], like.new.dtype):
            raise CheckpointError(f"{label} and {other_label} are for tables {name} of different shapes or types")
    rows = functools.reduce(np.union1d, [part.rows for _, part in parts])
    width = like.new.shape[1]
    old, new = np.zeros((2, len(rows), width), like.new.dtype)
    total, seen = np.zeros((len(rows), width)), np.zeros(len(rows), np.int64)
    for part_label, part in parts:
        at = np.searchsorted(rows, part.rows)
        again = seen[at] > 0
        if old[at[again]].tobytes() != part.old[again].tobytes():
            raise CheckpointError(f"{part_label}: expects other old rows of table {name} than those before it")
        old[at] = part.old
        new[at[~again] if conflicts == "first" else at] = part.new[~again] if conflicts == "first" else part.new
        total[at] += part.new.astype(np.float64) - part.old.astype(np.float64)
        seen[at] += 1
    if conflicts == "sum":
        several = seen > 1
        with np.errstate(over="ignore"):
            new[several] = (old[several].astype(np.float64) + total[several]).astype(new.dtype)
        if len(broken := rows[~np.isfinite(new.astype(np.float64)).all(axis=1)]):
            raise CheckpointError(f"the sums of {named_rows(name, broken)} are not finite; take the first or the last")
    return RowChange(like.num_slots, rows, old, new)
