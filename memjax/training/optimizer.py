"""AdamW for all parameters except tables, with a slower rate for queries and keys."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from memjax.config.optim import OptimConfig, ScheduleConfig
from memjax.memory.keys import QueryKeyParam
from memjax.memory.kinds import KINDS
from memjax.ops.precision import accumulator
from memjax.sharding.axes import has_several_devices
from memjax.sharding.rules import is_variable

_FROZEN = "frozen"


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Learning rate by step (from 0): a linear warm-up, then `config.schedule`."""
    warmup, decay = config.warmup_of(steps), config.decay_of(steps)
    if config.schedule == "constant" or (config.schedule == "wsd" and decay == 0):
        after = optax.constant_schedule(config.lr)
    elif config.schedule == "wsd":
        end = config.lr * config.final_fraction
        after = optax.linear_schedule(config.lr, end, decay, transition_begin=steps - warmup - decay)
    else:
        after = optax.cosine_decay_schedule(config.lr, max(1, steps - warmup), alpha=config.final_fraction)
    rise = optax.linear_schedule(0.0, config.lr, warmup)
    joined = optax.join_schedules([rise, after], [warmup]) if warmup else after

    def rate(step: ArrayLike) -> ArrayLike:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            return joined(step + 1)  # the first step counts as 1, since at rate 0 it would be wasted

    return rate


def make_optimizer(config: OptimConfig, steps: int, abstract_params: nnx.State) -> optax.GradientTransformation:
    """AdamW on the clipped gradient; matrices decay, norms and biases do not. Frozen parameters have no state."""
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

    # Checkpoints contain the names of groups. Queries and keys are a row's "address".
    by_group = optax.partition(
        {"dense": adamw(1.0), "address": adamw(config.key_lr_factor), _FROZEN: optax.set_to_zero()},
        parameter_groups(config, abstract_params),
    )
    # Joint clipping with the tables happens before the optimizer; neither form has state.
    clip = optax.identity()
    if config.max_grad_norm is not None and config.clip_tables != "joint":
        clip = clip_by_global_norm(config.max_grad_norm)
    return optax.chain(clip, by_group)


def at_step(state: optax.OptState, step: Array) -> optax.OptState:
    """The optimizer's state with its schedules set to the step, so that skipped updates count for them too."""
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    return jax.tree.map(
        lambda node: node._replace(count=step) if is_schedule(node) else node, state, is_leaf=is_schedule
    )


def global_norm(gradient: Any) -> Float[Array, ""]:
    """Euclidean norm of all gradients together, in float32 or wider; NaN if any leaf is NaN."""
    squares = [jnp.square(leaf.astype(accumulator(leaf.dtype))) for leaf in jax.tree.leaves(gradient)]
    if has_several_devices():
        return jnp.sqrt(sum(jnp.sum(square) for square in squares))
    # One small kernel per array and one for all of them take half the time of two per array. (Not if arrays are
    # sharded, so that no device has all of their rows.)
    rows = [(jnp.sum(square, axis=-1) if square.ndim > 1 else square).ravel() for square in squares]
    # The barrier keeps XLA from turning the sum of the concatenation back into one sum per array.
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(rows))))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Clips gradients by their global norm; optax's own function would sum bfloat16 squares in bfloat16."""

    def clip(gradient: Any, _: Any) -> Any:
        return scaled(gradient, jnp.minimum(1, limit / global_norm(gradient)))

    return optax.stateless(clip)


def scaled(gradient: Any, factor: Array) -> Any:
    """The gradient times a number, keeping its types."""
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), gradient)


def parameter_groups(config: OptimConfig, abstract_params: nnx.State) -> Any:
    """The group of each parameter, in the parameters' tree: `dense`, `address` (queries and keys) or `frozen`."""

    def group(path: tuple[Any, ...], variable: nnx.Variable) -> str:
        if isinstance(variable, QueryKeyParam):
            return "address"
        is_lookup = any(getattr(key, "key", None) in KINDS for key in path)
        return _FROZEN if config.freeze_dense and not is_lookup else "dense"

    return jax.tree_util.tree_map_with_path(group, abstract_params, is_leaf=is_variable)


def without_gradient_where_frozen(config: OptimConfig, params: nnx.State) -> nnx.State:
    """The parameters; frozen ones are constants for autodiff, so that their gradients are zero and cost nothing."""
    constant = lambda group, variable: jax.lax.stop_gradient(variable) if group == _FROZEN else variable
    return jax.tree.map(constant, parameter_groups(config, params), params)
