"""Dense parameters as nested dicts of arrays with text keys, the form in which checkpoints keep them."""

from typing import Any

import jax
from flax import nnx

from memjax.models.parts import DecoderParts


def params_to_tree(params: nnx.State) -> dict[str, Any]:
    """The parameters as nested dicts, `blocks/0/attention/key/kernel`; shapes in place of arrays are kept too."""
    return _with_text_keys(nnx.to_pure_dict(params))


def tree_to_params(parts: DecoderParts, tree: dict[str, Any]) -> nnx.State:
    """The parameters that `params_to_tree` gave.

    Raises:
        KeyError: the decoder has a parameter that the tree lacks.
    """

    def find(path: tuple[Any, ...], _: Any) -> Any:
        found = tree
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):  # what follows the dicts lies inside the variable
                found = found[str(key.key)]
        return found

    return jax.tree_util.tree_map_with_path(find, parts.abstract_params)


def _with_text_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(name): _with_text_keys(inner) for name, inner in tree.items()}
