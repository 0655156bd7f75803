"""Cases of the dot: see `memjax.ops.specs`."""

from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """A dot with rows of a table."""
    table, indices, vectors = draw.normal(500, 96), draw.integers(500, 33, 7), draw.normal(33, 96)
    dot = lambda name, table, vectors: embedding_dot(table, indices, vectors, implementation=name)
    return {"dot": Case(dot, (table, vectors))}
