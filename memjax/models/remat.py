"""What a block's backward pass computes again instead of keeping it."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from memjax.memory import parallel
from memjax.models.experts import SAVED_ROUTING
from memjax.ops.embedding_bag.api import SAVED_NAME as SAVED_BAG
from memjax.ops.embedding_dot.api import SAVED_NAME as SAVED_DOT
from memjax.ops.product_key_search.api import SAVED_INDICES, SAVED_SCORES

Remat = Literal["none", "dots", "block"]

ELEMENTWISE = """
abs add and ceil clamp convert_element_type copy cos div eq exp exp2 floor ge gt integer_pow le log log1p logistic lt
max min mul ne neg not or pow round rsqrt select_n sign sin sqrt square stop_gradient sub tanh xor
"""
LAYOUT = "broadcast_in_dim concatenate expand_dims iota pad reshape slice split squeeze transpose"
CHEAP = frozenset(f"{ELEMENTWISE} {LAYOUT}".split())
"""Primitives that XLA fuses into whatever uses them: reading what they made costs as much as making it again."""


def rematerialised(remat: Remat) -> Callable[[Callable], Callable]:
    """jax.checkpoint with the named policy; no search or bag runs twice: they are memory-bound, their outputs small.

    Nor does a router choose twice: rounded otherwise, it might choose others. Weights that were gathered for the
    forward pass are never kept, but gathered again.
    """
    policies = jax.checkpoint_policies
    if remat == "none" and not parallel.has_several_devices():
        return lambda function: function
    policy = policies.save_only_these_names(SAVED_BAG, SAVED_DOT, SAVED_SCORES, SAVED_INDICES, SAVED_ROUTING)
    if remat == "none":
        policy = _all_but_cheap_and_gathered
    elif remat == "dots":
        policy = policies.save_from_both_policies(policy, policies.dots_with_no_batch_dims_saveable)
    return lambda function: jax.checkpoint(function, policy=policy)


def _all_but_cheap_and_gathered(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """jax.checkpoint keeps what its policy names even where XLA would rather make it again."""
    if primitive.name in CHEAP:
        return False
    but_gathered = jax.checkpoint_policies.save_anything_except_these_names(parallel.WHOLE_WEIGHTS)
    return but_gathered(primitive, *arguments, **parameters)
