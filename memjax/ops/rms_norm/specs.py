"""Cases of the norm: see `memjax.ops.specs`."""

from memjax.ops.rms_norm.api import rms_norm
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """A norm; its gradient together with that of the residual."""
    norm = lambda name, x, scale: rms_norm(x, scale, 1e-5, implementation=name)
    return {"norm": Case(norm, (draw.normal(33, 96), 1 + draw.normal(96)))}
