"""The operations of a memory layer on a mesh with the axes ('data', 'memory').

Tokens are split over both axes, the columns of a table over `memory`; keys are on every device. Inside `shard_map` each
device searches for its own tokens, gathers the picks of its memory group, sums its own columns of all the group's bags,
and an all-to-all returns whole rows to the device that owns the token. For dots the way is the opposite: an all-to-all
hands out the columns of the vectors, and the parts of each product are summed on the device that owns the token.

The mesh is the ambient one (`jax.set_mesh`). Without it, without both axes, or inside a `jax.shard_map` over them,
these are the plain operations, so one device, a mesh and somebody else's model run the same layer.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax import config_checks
from memjax.memory import row_exchange
from memjax.ops import dispatch
from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.precision import accumulator
from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.rms_norm.api import Normed, rms_norm
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update import dense
from memjax.ops.row_update.api import check_state, row_update
from memjax.ops.row_update.rules import RowRule, RowStep, TableState
from memjax.ops.shapes import describe, require

DATA, MEMORY = "data", "memory"
TOKENS = P((DATA, MEMORY))
"""Arrays with tokens (or sequences) in front."""
COLUMNS = P(None, MEMORY)
"""Tables and their state."""
BAGS = P(DATA, MEMORY)
"""Bags before the all-to-all: tokens over `data`, columns over `memory`."""

Weights = TypeVar("Weights")


def has_memory_axis() -> bool:
    """Whether the ambient mesh splits tables: it has both axes, and neither is a caller's own in a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {DATA, MEMORY} <= set(mesh.axis_names) - set(mesh.manual_axes)


def has_several_devices() -> bool:
    """Whether the ambient mesh splits anything at all."""
    return has_memory_axis() and jax.sharding.get_abstract_mesh().size > 1


def search(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """`product_key_search`, each device for its own tokens."""
    run = partial(product_key_search, top_k=top_k, implementation=implementation)
    if not has_memory_axis():
        return _plain(run, queries)(queries, keys)
    return over_mesh(run, (TOKENS, P()), (TOKENS, TOKENS))(queries, keys)


def bag(
    table: Float[Array, "n d"],
    indices: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    tap: Float[Array, "t d"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "t d"]:
    """`embedding_bag` plus the tap, a zero whose cotangent is the cotangent of the bag.

    The tap is added before the all-to-all, so its cotangent is already split by columns, as `update_rows` wants it.
    """
    if tap is not None:
        tokens = (*indices.shape[:1], *table.shape[1:])
        require(
            "bag", tap.shape == tokens, "a tap must have the shape of the bags", tap=tap, indices=indices, table=table
        )
    run = partial(embedding_bag, implementation=implementation)
    if not has_memory_axis():
        out = _plain(run, indices)(table, indices, weights)
        return out if tap is None else out + tap

    def local(table: Array, indices: Array, weights: Array, *taps: Array) -> Array:
        indices, weights = (jax.lax.all_gather(picks, MEMORY, tiled=True) for picks in (indices, weights))
        out = sum(taps, start=run(table, indices, weights))
        return jax.lax.all_to_all(out, MEMORY, split_axis=0, concat_axis=1, tiled=True)

    taps = () if tap is None else (tap,)
    specs = (COLUMNS, TOKENS, TOKENS, *(BAGS for _ in taps))
    return over_mesh(local, specs, TOKENS)(table, indices, weights, *taps)


def norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], epsilon: float, *, implementation: str | None = None
) -> Normed:
    """`rms_norm`, each device for its own tokens."""
    name = dispatch.choose("rms_norm", implementation, x.dtype)
    run = partial(rms_norm, epsilon=epsilon, implementation=name)
    if name != "triton":
        return run(x, scale)
    # XLA cannot split a kernel.
    return (over_mesh(run, (TOKENS, P()), TOKENS) if has_memory_axis() else _plain(run, x))(x, scale)


def dot(
    table: Float[Array, "n d"],
    indices: Int[Array, "t k"],
    vectors: Float[Array, "t d"],
    tap: Float[Array, "t k"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "t k"], Float[Array, "t d"]]:
    """`embedding_dot` plus the tap, a zero whose cotangent is the cotangent of the dots; and the vectors.

    The vectors come back split by columns like the bags of `bag`, as `update_rows` wants them.
    """
    if tap is not None:
        require("dot", tap.shape == indices.shape, "a tap must have the shape of the dots", tap=tap, indices=indices)
    run = partial(embedding_dot, implementation=implementation)
    if not has_memory_axis():
        out = _plain(run, indices)(table, indices, vectors)
        return out if tap is None else out + tap, vectors

    def local(table: Array, indices: Array, vectors: Array, *taps: Array) -> tuple[Array, Array]:
        indices = jax.lax.all_gather(indices, MEMORY, tiled=True)
        columns = jax.lax.all_to_all(vectors, MEMORY, split_axis=1, concat_axis=0, tiled=True)
        out = jax.lax.psum_scatter(run(table, indices, columns), MEMORY, scatter_dimension=0, tiled=True)
        return sum(taps, start=out), columns

    taps = () if tap is None else (tap,)
    specs = (COLUMNS, TOKENS, TOKENS, *(TOKENS for _ in taps))
    return over_mesh(local, specs, (TOKENS, BAGS))(table, indices, vectors, *taps)


def zero_tap(num_tokens: int, value_dim: int, dtype) -> Float[Array, "t d"]:
    """A tap of `bag`, laid out as it is added there; that of `dot` is `zero_dot_tap`."""
    tap = jnp.zeros((num_tokens, value_dim), dtype)
    return _place(tap, BAGS) if has_memory_axis() else tap


def zero_dot_tap(num_tokens: int, picks: int, table_dtype: DTypeLike) -> Float[Array, "t k"]:
    """A tap of `dot` for a table of the given type, laid out as it is added there."""
    return split_tokens(jnp.zeros((num_tokens, picks), accumulator(table_dtype)))


def update_rows(
    table: Float[Array, "n d"],
    state: TableState,
    gradients: Sequence[RowGradient],
    rule: RowRule,
    step: RowStep,
    *,
    exchange: Literal["auto", "factored", "dense"] = "auto",
    implementation: str | None = None,
    piece_picks: int = dense.PIECE_PICKS,
    block_bytes: int = dense.BLOCK_BYTES,
) -> tuple[Float[Array, "n d"], TableState]:
    """`row_update` on every device's columns, with the picks of all tokens of the mesh.

    Replicas of a column shard see the same picks in the same order (factored), or the same sum of what each has summed
    of its own tokens (dense), so they stay bit-equal. See `row_exchange.choose` for auto. Without a `memory` axis there
    are no replicas, and nothing is exchanged.

    Args:
        table: rows.
        state: of the rule.
        gradients: of all layers that read the table.
        rule: the optimizer.
        step: rate, number and so on.
        exchange: how row gradients cross the `data` axis.
        implementation: of `row_update`.
        piece_picks: picks that are sorted at once, where they are summed dense.
        block_bytes: dense gradient of the rows that are updated at once.

    Raises:
        ValueError: shapes do not fit together, or `exchange` or `implementation` is unknown.
    """
    if not gradients:
        raise ValueError("update_rows needs at least one RowGradient")
    for gradient in gradients:
        gradient.check(table.shape[1])
    check_state(table, state, rule)
    config_checks.refuse(config_checks.one_of(("auto", *get_args(row_exchange.Exchange)), exchange=exchange))
    if not has_memory_axis():
        run = partial(row_update, rule=rule, implementation=implementation)
        return _plain(run, table)(table, state, gradients, step=step)

    axes = jax.sharding.get_abstract_mesh().shape
    sizes = {"data_axis": axes[DATA], "memory_axis": axes[MEMORY]}
    factored = row_exchange.choose(exchange, table, gradients, **sizes) == "factored"

    def local(table: Array, state: TableState, gradients: Sequence[RowGradient], step: RowStep):
        gather = partial(_gather_gradient, whole_mesh=factored)
        step = step._replace(first_column=step.first_column + jax.lax.axis_index(MEMORY) * table.shape[1])
        if factored:
            return row_update(table, state, list(map(gather, gradients)), rule, step, implementation=implementation)
        gradient, touched = dense.summed(
            gradients, table.shape[0], gather=gather, piece_picks=piece_picks, implementation=implementation
        )
        touched = jax.lax.psum(touched.astype(jnp.int32), DATA) > 0
        reduce = partial(jax.lax.psum, axis_name=DATA)
        return dense.update_touched(table, state, gradient, touched, rule, step, reduce=reduce, block_bytes=block_bytes)

    factors = RowGradient._make((TOKENS, TOKENS, BAGS))
    specs = (COLUMNS, COLUMNS, [factors] * len(gradients), P())
    return over_mesh(local, specs, (COLUMNS, COLUMNS))(table, state, list(gradients), step)


def _gather_gradient(gradient: RowGradient, *, whole_mesh: bool) -> RowGradient:
    """All tokens' row gradient of a device's columns: of the whole mesh, or of its replica of the table."""
    over = (DATA, MEMORY) if whole_mesh else MEMORY
    gather = partial(jax.lax.all_gather, tiled=True)
    indices, weights = gather(gradient.indices, over), gather(gradient.weights, over)
    return RowGradient(indices, weights, gather(gradient.vectors, DATA) if whole_mesh else gradient.vectors)


def on_own_tokens(function: Callable, tokens: Sequence[Array], weights: Sequence[Array]) -> Any:
    """`function(*tokens, *weights)`, each device for its own tokens, with weights that are whole on all of them.

    What stands in front in `tokens` and in the results is split, be it tokens or sequences of them.
    """
    if not has_memory_axis():
        return _plain(function, tokens[0])(*tokens, *weights)
    specs = (*(TOKENS for _ in tokens), *(P() for _ in weights))
    return over_mesh(function, specs, TOKENS)(*tokens, *weights)


def split_columns(table: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The table with its columns split over the memory axis, where there is one."""
    return _place(table, COLUMNS) if has_memory_axis() else table


def split_tokens(array: Array) -> Array:
    """An array with tokens or sequences in front, split over all devices, where there is a mesh."""
    return _place(array, TOKENS) if has_memory_axis() else array


def whole(weights: Weights, dtype: DTypeLike | None = None) -> Weights:
    """Weights (a module, or arrays) whole on every device, for the time of their use, where there is a mesh.

    Matrices are cast to dtype before they are sent. What is whole already stays as it is. Under an Explicit mesh the
    layout of weights is their owner's affair. Gradients go through it backwards only (`jax.grad`, not `jax.jvp`).
    """
    if not has_several_devices() or _is_explicit():
        return weights

    def gather(weight: Array) -> Array:
        if dtype is not None and weight.ndim >= 2:
            weight = weight.astype(dtype)
        return _gathered(weight)

    return jax.tree.map(gather, weights)


@jax.custom_vjp
def _gathered(weight: Array) -> Array:
    """The array whole on every device; nothing is asked of its gradient, which nobody needs whole.

    The transpose of a plain constraint would ask for all of it on every device, and where XLA does not see that only a
    piece is kept it would be summed everywhere.
    """
    return jax.lax.with_sharding_constraint(weight, P())


_gathered.defvjp(lambda weight: (_gathered(weight), None), lambda _, gradient: (gradient,))


def everywhere(array: Array) -> Array:
    """The array whole on every device, so that every process can read it."""
    return array if jax.sharding.get_abstract_mesh().empty else _place(array, P())


def fold(x: Float[Array, "*b dim"]) -> Float[Array, "t dim"]:
    """The batch axes as one of tokens. Under an Explicit mesh it is split like the first of them."""
    if _is_explicit() and x.ndim > 2:
        spec = jax.typeof(x).sharding.spec
        x = jax.sharding.reshard(x, P(spec[0], *[None] * (x.ndim - 2), spec[-1]))
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unfold(tokens: Float[Array, "t d"], x: Float[Array, "*b dim"]) -> Float[Array, "*b d"]:
    """Tokens of `fold(x)` in the batch axes of x, under an Explicit mesh laid out like them."""
    shape = (*x.shape[:-1], tokens.shape[-1])
    if not _is_explicit():
        return tokens.reshape(shape)
    unfolded = jax.sharding.reshard(tokens, _front(x)).reshape(shape)
    return jax.sharding.reshard(unfolded, P(*jax.typeof(x).sharding.spec[:-1]))


def over_mesh(function, in_specs, out_specs):
    """shard_map over the ambient mesh. Collectives' results are not checked for their types: kernels carry none."""
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def place(spec: P, argument):
        # An Explicit mesh does not move arrays by itself.
        put = _place if _is_explicit() else _checked
        return jax.tree.map(lambda array: put(array, spec), argument)

    def placed(*arguments):
        return mapped(*jax.tree.map(place, in_specs, arguments, is_leaf=lambda spec: isinstance(spec, P)))

    return placed


def _plain(function: Callable, like: Array) -> Callable:
    """The function itself; under an Explicit mesh automatic inside, its results split in front like `like`."""
    return jax.sharding.auto_axes(function, out_sharding=_front(like)) if _is_explicit() else function


def _front(array: Array) -> P:
    """How the first axis is split, by its type under an Explicit mesh."""
    return P(*jax.typeof(array).sharding.spec[:1]) if array.ndim > 1 else P()


def _is_explicit() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _place(array: Array, spec: P) -> Array:
    """The array in the given layout: a demand under an Explicit mesh, a constraint under an Auto one."""
    array = _checked(array, spec)
    if _is_explicit():
        return jax.sharding.reshard(array, spec)
    return jax.lax.with_sharding_constraint(array, spec)


def _checked(array: Array, spec: P) -> Array:
    """The array, whose axes the mesh can split evenly.

    Raises:
        ValueError: it cannot; the message says what to do.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        devices, length = math.prod(sizes[name] for name in names), array.shape[axis]
        if length % devices == 0:
            continue
        over = f"{devices} devices ({' x '.join(f'{name}={sizes[name]}' for name in names)})"
        if axis == 0:
            raise ValueError(
                f"{length} tokens or sequences (the first axis of {describe(array)}) cannot be split evenly over "
                f"{over}: fill up to {-(-length // devices) * devices} with padding, or use a mesh of other sizes"
            )
        raise ValueError(
            f"{length} columns of {describe(array)} cannot be split evenly over {over}: choose a width that is a "
            f"multiple of {devices}, or a mesh of other sizes"
        )
    return array
