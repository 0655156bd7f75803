"""Cases of the update: see `memjax.ops.specs`."""

from functools import partial
from typing import Any, get_args

from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import Kind, RowRule, row_step
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """One update by each rule, of rows that several tokens read."""
    table = draw.normal(60, 96)
    gradient = RowGradient(draw.integers(60, 9, 7), draw.normal(9, 7), draw.normal(9, 96))

    def update(rule: RowRule, name: str) -> Any:
        return row_update(table, rule.init(60, 96), [gradient], rule, row_step(1e-2, 0), implementation=name)

    return {kind: Case(partial(update, RowRule(kind=kind, state_columns=32))) for kind in get_args(Kind)}
