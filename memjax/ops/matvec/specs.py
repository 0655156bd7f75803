"""Cases of the matrix-vector product: see `memjax.ops.specs`."""

from memjax.ops.matvec.api import matvec
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """A product added to a residual, a gated one with a bias, and one of a gated input."""
    x, rows, residual = draw.normal(1500), draw.normal(10, 1500) / 40, draw.normal(10)
    return {
        "residual": Case(lambda name: matvec(x, rows, residual, implementation=name)),
        "gated": Case(lambda name: matvec(x, rows, bias=residual, gated=True, implementation=name)),
        "input gate": Case(
            lambda name: matvec(x, rows, residual, bias=residual, input_gate=2 * x, implementation=name)
        ),
    }
