"""Support for operations inside a caller's `jax.shard_map`, which tracks the mesh axes over which each value varies.

A loop's carry must keep its type from one iteration to the next, and a custom gradient must have that of its argument.
Constants vary over no axis but sharded arguments do; `vary_together` gives all of them one type. Outside `shard_map`,
and inside one with check_vma=False, nothing varies and everything here is the identity.
"""

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def vary_together(tree: Tree) -> Tree:
    """The arrays of a tree, all varying over every manual axis over which any of them varies."""
    return vary_like(tree, tree)


def vary_like(tree: Tree, other: Any) -> Tree:
    """The arrays of a tree, varying over their own manual axes and those of the other tree's arrays."""
    axes = frozenset[str]().union(*(_varying(leaf) for leaf in jax.tree.leaves(other)))

    def vary(leaf: Any) -> Any:
        missing = axes - _varying(leaf)
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


def _varying(leaf: Any) -> frozenset[str]:
    return jax.typeof(leaf).mat.varying  # pyright: ignore[reportAttributeAccessIssue]  # of shaped arrays
