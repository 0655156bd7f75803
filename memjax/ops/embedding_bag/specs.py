"""Cases of the bag: see `memjax.ops.specs`."""

from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """A bag of rows of a table."""
    table, indices, weights = draw.normal(500, 96), draw.integers(500, 33, 7), draw.normal(33, 7)
    bag = lambda name, table, weights: embedding_bag(table, indices, weights, implementation=name)
    return {"bag": Case(bag, (table, weights))}
