"""Cases of the search: see `memjax.ops.specs`."""

from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """A search, without its indices: which of two equal scores comes first is not promised."""
    scores = lambda name, queries, keys: product_key_search(queries, keys, 5, implementation=name)[0]
    return {"scores": Case(scores, (draw.normal(5, 2, 32), draw.normal(2, 2, 40, 16)))}
