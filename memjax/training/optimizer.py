"""The optimizer of the dense parameters: AdamW, with a slower rate for queries and keys."""

import jax
import optax
from flax import nnx

from memjax.config import OptimConfig, ScheduleConfig
from memjax.memory.keys import AddressParam


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Learning rate by step number (from 0): a linear warm-up, then a cosine to final_fraction or a constant."""
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    else:
        after = optax.cosine_decay_schedule(config.lr, max(1, steps - config.warmup_steps), alpha=config.final_fraction)
    rise = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    joined = optax.join_schedules([rise, after], [config.warmup_steps]) if config.warmup_steps else after
    # The first step counts as 1: at rate 0 it would be wasted.
    return lambda step: joined(step + 1)


def make_optimizer(config: OptimConfig, steps: int, abstract_params: nnx.State) -> optax.GradientTransformation:
    """AdamW on the clipped gradient; matrices decay, norms and biases do not."""
    schedule = make_schedule(config, steps)

    def adamw(factor: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: factor * schedule(step),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda param: param.ndim >= 2, params),
        )

    labels = jax.tree.map(
        lambda variable: "address" if isinstance(variable, AddressParam) else "dense",
        abstract_params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    by_group = optax.partition({"dense": adamw(1.0), "address": adamw(config.key_lr_factor)}, labels)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, by_group)
