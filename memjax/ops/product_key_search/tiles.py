"""How the selection of the best scores cuts its work."""

from memjax.ops.tiles import Tile, next_power_of_two, tuned


def select(num: int, top_k: int) -> Tile:
    """Groups (`rows`) and neighbouring scores (`columns`) of the selection from a row of `num` scores."""
    whole, round_k = next_power_of_two(num), max(2, next_power_of_two(top_k))
    found = tuned("product_key_search", "select" if whole <= 2048 else "select_long")
    # Fewer groups than picks would leave picks out, and a short row is sorted at once.
    run = min(found.get("columns", 4), max(1, whole // (2 * round_k)))
    groups = min(max(found.get("rows", 256 if whole > 2048 else 128), 2 * round_k), max(2, whole // run))
    return Tile(rows=groups, columns=run, num_warps=found.get("num_warps", 1))
