"""Sharding of arrays under the ambient mesh (`jax.set_mesh`) with the axes ('data', 'memory', 'tensor').

Tokens are sharded over `data` and `memory`, the columns of a table over `memory`. The optional axis `tensor` shards
dense parameters only, and how they are used is left to XLA. Without a mesh, or without a `memory` axis, everything here
leaves arrays as they are, so one device, a mesh and a caller's own model run the same code.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.ops.shapes import describe
from memjax.sharding import rules

Weights = TypeVar("Weights")
Tree = TypeVar("Tree")


def _automatic_sizes() -> dict[str, int]:
    """Sizes of the ambient mesh's axes, except those that are manual in a caller's `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def has_memory_axis() -> bool:
    """Whether the ambient mesh shards tokens and tables: it has both axes, and not all devices are along `tensor`."""
    sizes = _automatic_sizes()
    if not {rules.DATA, rules.MEMORY} <= sizes.keys():
        return False
    return sizes[rules.DATA] * sizes[rules.MEMORY] > 1 or sizes.get(rules.TENSOR, 1) == 1


def has_several_devices() -> bool:
    """Whether the ambient mesh shards anything at all."""
    return {rules.DATA, rules.MEMORY} <= _automatic_sizes().keys() and jax.sharding.get_abstract_mesh().size > 1


def on_own_tokens(function: Callable, tokens: Sequence[Array], weights: Sequence[Array], **settings: Hashable) -> Any:
    """`function(*tokens, *weights, **settings)`, run by each device on its own tokens, with replicated weights.

    The first axis of `tokens` and of the results, be it of tokens or of sequences, is sharded unless it is empty. As
    for `over_mesh`, the function must be defined at the top level of a module.
    """
    if not has_memory_axis() or tokens[0].size == 0:
        return unsharded(partial(function, **settings), tokens[0])(*tokens, *weights)
    specs = (*(rules.TOKENS for _ in tokens), *(rules.REPLICATED for _ in weights))
    return over_mesh(function, specs, rules.TOKENS, **settings)(*tokens, *weights)


def tensor_pieces(matrix: nnx.Variable) -> int:
    """Number of equal shards of a matrix's columns over `tensor`."""
    if not has_several_devices() or _is_explicit():
        return 1
    sizes = _automatic_sizes()
    entry = rules.parameter_spec(matrix.shape, rules.names_of(matrix), sizes)[1:]
    return sizes[rules.TENSOR] if rules.TENSOR in jax.tree.leaves(entry) else 1


def split_columns(table: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The table with its columns sharded over the `memory` axis, if there is one."""
    return place(table, rules.COLUMNS) if has_memory_axis() else table


def committed_as(tree: Tree, like: Any) -> Tree:
    """A tree of new arrays, committed to the device of the arrays of another tree, if these are committed to just one.

    Otherwise a step that takes and returns both would be compiled twice, because all arrays that it returns are
    committed.
    """
    arrays = [leaf for leaf in jax.tree.leaves(like) if not isinstance(leaf, Tracer)]
    places = {array.sharding for array in arrays if isinstance(array, jax.Array) and array.committed}
    is_one = len(places) == 1 and isinstance(next(iter(places)), SingleDeviceSharding)
    return jax.device_put(tree, *places) if is_one else tree


def split_tokens(array: Array) -> Array:
    """An array whose first axis is tokens or sequences, sharded over all devices if there is a mesh."""
    return place(array, rules.TOKENS) if has_memory_axis() else array


def gathered(weights: Weights, dtype: DTypeLike | None = None) -> Weights:
    """Weights (a module, or arrays) gathered over `data` and `memory` while they are used, if there is a mesh.

    What the rules shard over `tensor` stays sharded. Matrices are cast to dtype before they are sent. Under an Explicit
    mesh, the sharding of weights is left to their owner. Supports only reverse-mode differentiation (`jax.grad`, not
    `jax.jvp`).
    """
    if not has_several_devices() or _is_explicit():
        return weights
    sizes = _automatic_sizes()

    def gather(node: Any) -> Any:
        def one(weight: Array) -> Array:
            if dtype is not None and weight.ndim >= 2:
                weight = weight.astype(dtype)
            return _gathered(rules.parameter_spec(weight.shape, rules.names_of(node), sizes), weight)

        return jax.tree.map(one, node)

    return jax.tree.map(gather, weights, is_leaf=rules.is_variable)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(spec: P, weight: Array) -> Array:
    """The array with a sharding; that of its gradient is left open.

    The transpose of a plain constraint would demand the gathered gradient on every device, and unless XLA sees that
    only a shard is kept, it would be summed everywhere.
    """
    return jax.lax.with_sharding_constraint(weight, spec)


_gathered.defvjp(lambda spec, weight: (_gathered(spec, weight), None), lambda spec, _, gradient: (gradient,))


def replicate(array: Array) -> Array:
    """The array on every device, so that every process can read it."""
    return array if jax.sharding.get_abstract_mesh().empty else place(array, rules.REPLICATED)


def fold(x: Float[Array, "*b dim"]) -> Float[Array, "t dim"]:
    """Folds the batch axes into one of tokens. Under an Explicit mesh, it is sharded like the first of them."""
    if _is_explicit() and x.ndim > 2:
        spec = jax.typeof(x).sharding.spec
        x = jax.sharding.reshard(x, P(spec[0], *[None] * (x.ndim - 2), spec[-1]))
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unfold(tokens: Float[Array, "t d"], x: Float[Array, "*b dim"]) -> Float[Array, "*b d"]:
    """Unfolds the tokens of `fold(x)` into the batch axes of x; under an Explicit mesh, they are sharded like x."""
    shape = (*x.shape[:-1], tokens.shape[-1])
    if not _is_explicit():
        return tokens.reshape(shape)
    unfolded = jax.sharding.reshard(tokens, _front(x)).reshape(shape)
    return jax.sharding.reshard(unfolded, P(*jax.typeof(x).sharding.spec[:-1]))


def over_mesh(function: Callable, in_specs: Any, out_specs: Any, **settings: Hashable) -> Callable[..., Any]:
    """shard_map over the ambient mesh, without checking over which axes values vary, since kernels do not track that.

    The function must be defined at the top level of a module, settings are its keyword arguments, and specs are tuples:
    calls that agree in these share one compiled program, or one trace under `jax.jit`. A closure would be compiled at
    every call, and kept.

    Under an Auto mesh, `tensor` stays automatic. A function that is `alike_over_tensor` is not sharded over it inside:
    the devices of a tensor group do the same work on the same tokens, without collectives. (A manual axis would cost
    one per gradient: without types, shard_map cannot know that gradients are equal, and sums them.) For a memory, each
    device of a tensor group therefore reads the rows of all its tokens; in return, the replicas of a table see all
    picks anyway, and row updates need no collective over `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = {rules.TENSOR} if mesh.shape.get(rules.TENSOR, 1) > 1 and not _is_explicit() else set()
    manual = frozenset(mesh.axis_names) - set(mesh.manual_axes) - left
    mapped = _mapped(function, mesh, manual, in_specs, out_specs, tuple(settings.items()))

    def lay_out(spec: P, argument):
        # Under an Explicit mesh, arrays are not resharded automatically.
        put = place if _is_explicit() else checked
        return jax.tree.map(lambda array: put(array, spec), argument)

    def placed(*arguments):
        return mapped(*jax.tree.map(lay_out, in_specs, arguments, is_leaf=lambda spec: isinstance(spec, P)))

    return placed


@lru_cache(maxsize=256)
def _mapped(
    function: Callable,
    mesh: AbstractMesh,
    axes: frozenset[str],
    in_specs: Any,
    out_specs: Any,
    settings: tuple[tuple[str, Hashable], ...],
) -> Callable[..., Any]:
    """shard_map over axes of the mesh, jitted, because outside jax.jit it does not support custom gradients."""
    run = partial(function, **dict(settings))
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.jit(jax.shard_map(run, mesh=mesh, axis_names=set(axes), check_vma=False, **specs))


def alike_over_tensor(function: Callable) -> Callable:
    """The function, with arguments, results and their gradients replicated over `tensor`, if the mesh has it.

    It is for functions left to XLA inside `over_mesh`, or on a mesh of `tensor` alone. XLA would propagate the sharding
    of a neighbouring projection into them: shard a table by columns, and gather all of it after every update.
    """

    @wraps(function)
    def alike(*arguments: Any, **settings: Any) -> Any:
        sizes = _automatic_sizes()
        if sizes.get(rules.TENSOR, 1) == 1 or math.prod(sizes.values()) > sizes[rules.TENSOR] or _is_explicit():
            return function(*arguments, **settings)
        replicate = partial(
            jax.tree.map, lambda leaf: place(leaf, rules.REPLICATED) if isinstance(leaf, Array) else leaf
        )
        return replicate(function(*replicate(arguments), **settings))

    return alike


def unsharded(function: Callable, like: Array) -> Callable:
    """The function itself; under an Explicit mesh, automatic inside, with results sharded on axis 0 like `like`."""
    return jax.sharding.auto_axes(function, out_sharding=_front(like)) if _is_explicit() else function


def unsharded_update(function: Callable, state: Any) -> Callable:
    """The function itself; under an Explicit mesh, automatic inside, with results sharded like the state."""
    if not _is_explicit():
        return function
    return jax.sharding.auto_axes(
        function, out_sharding=jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, state)
    )


def _front(array: Array) -> P:
    """The sharding of the first axis, from the array's type under an Explicit mesh."""
    return P(*jax.typeof(array).sharding.spec[:1]) if array.ndim > 1 else P()


def _is_explicit() -> bool:
    """Whether the ambient mesh is Explicit."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def place(array: Array, spec: P) -> Array:
    """The array with the given sharding: resharded under an Explicit mesh, constrained under an Auto one."""
    array = checked(array, spec)
    if _is_explicit():
        return jax.sharding.reshard(array, spec)
    return jax.lax.with_sharding_constraint(array, spec)


def checked(array: Array, spec: P) -> Array:
    """The array, if the mesh can shard its axes evenly; otherwise a ValueError that says what to do."""
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
