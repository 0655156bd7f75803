"""Operations inside a caller's `jax.shard_map`, which checks over which mesh axes each value varies.

A loop's carry must have the type of what the loop makes of it, and a custom gradient that of its argument. Constants
vary over no axis, sharded arguments do: `vary_together` gives all of them one type. Outside of `shard_map`, and inside
one with check_vma=False, nothing varies and everything here is the identity.
"""

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def vary_together(tree: Tree) -> Tree:
    """The arrays of a tree, each varying over every manual axis over which one of them does."""
    return vary_like(tree, tree)


def vary_like(tree: Tree, other: Any) -> Tree:
    """The arrays of a tree, varying over the manual axes of the other tree's arrays as well as over their own."""
    axes = frozenset[str]().union(*(_varying(leaf) for leaf in jax.tree.leaves(other)))

    def vary(leaf: Any) -> Any:
        missing = axes - _varying(leaf)
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


def _varying(leaf: Any) -> frozenset[str]:
    return jax.typeof(leaf).mat.varying  # pyright: ignore[reportAttributeAccessIssue]  # of shaped arrays
