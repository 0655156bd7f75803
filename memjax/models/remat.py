"""Rematerialisation: the activations of a block that its backward pass recomputes."""

from collections.abc import Callable
from typing import Literal, get_args

import jax

from memjax.config import checks
from memjax.models.moe import SAVED_ROUTING
from memjax.ops.product_key_search.api import SAVED_INDICES, SAVED_SCORES
from memjax.ops.table_read import SAVED_NAMES

Remat = Literal["none", "dots", "block"]


def rematerialised(remat: Remat) -> Callable[[Callable], Callable]:
    """jax.checkpoint with the named policy. No search or bag runs twice: they are memory-bound, with small outputs.

    Nor does a router choose twice: with different rounding, it might choose other experts. Weights gathered for the
    forward pass are gathered again for the backward pass; with "none", which recomputes nothing, they are kept.
    """
    checks.refuse(checks.one_of(get_args(Remat), remat=remat))
    if remat == "none":
        return lambda function: function
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*SAVED_NAMES.values(), SAVED_SCORES, SAVED_INDICES, SAVED_ROUTING)
    if remat == "dots":
        policy = policies.save_from_both_policies(policy, policies.dots_with_no_batch_dims_saveable)
    return lambda function: jax.checkpoint(function, policy=policy)
