"""Convert trees to leaves by name, and these to the nested dictionaries that Orbax stores."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import traverse_util

from memjax.errors import CheckpointError


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves by name, in the order of the tree; a name is the path joined by slashes."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in paths}
    folders = {name[: slash.start()] for name in flat for slash in re.finditer("/", name)}
    if len(flat) != len(paths) or not folders.isdisjoint(flat):
        raise CheckpointError(
            "a leaf has the name of another one, or of a dictionary that holds others; rename a key with a slash among "
            f"{', '.join(sorted(flat))}"
        )
    return flat


RENAMED = {"peer": "expert_lookup"}
"""Parts of names, with what versions before 0.2 called them."""


def as_stored(flat: Mapping[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """The leaves by the names under which a step stores them, which may be those of an earlier version."""

    def before(name: str) -> str:
        return "/".join(RENAMED.get(part, part) for part in name.split("/"))

    return {before(name) if name not in stored and before(name) in stored else name: flat[name] for name in flat}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, one level for each slash in the names."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
