"""Layouts of arrays under the ambient mesh (`jax.set_mesh`) with the axes ('data', 'memory', 'tensor').

Tokens are split over `data` and `memory`, the columns of a table over `memory`; `tensor`, which a mesh need not have,
splits dense parameters only, and how is left to XLA. Without a mesh, or without a `memory` axis, everything here leaves
arrays as they are, so one device, a mesh and a caller's own model run the same code.
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
    """Sizes of the ambient mesh's axes, without those that are a caller's own in a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def has_memory_axis() -> bool:
    """Whether the ambient mesh splits tokens and tables: it has both axes, and not only devices along `tensor`."""
    sizes = _automatic_sizes()
    if not {rules.DATA, rules.MEMORY} <= sizes.keys():
        return False
    return sizes[rules.DATA] * sizes[rules.MEMORY] > 1 or sizes.get(rules.TENSOR, 1) == 1


def has_several_devices() -> bool:
    """Whether the ambient mesh splits anything at all."""
    return {rules.DATA, rules.MEMORY} <= _automatic_sizes().keys() and jax.sharding.get_abstract_mesh().size > 1


def on_own_tokens(function: Callable, tokens: Sequence[Array], weights: Sequence[Array], **settings: Hashable) -> Any:
    """`function(*tokens, *weights, **settings)`, each device for its own tokens, with replicated weights.

    The first axis of `tokens` and of the results is split, be it of tokens or of sequences, unless it is empty. As for
    `over_mesh`, the function is one of a module.
    """
    if not has_memory_axis() or tokens[0].size == 0:
        return unsharded(partial(function, **settings), tokens[0])(*tokens, *weights)
    specs = (*(rules.TOKENS for _ in tokens), *(rules.REPLICATED for _ in weights))
    return over_mesh(function, specs, rules.TOKENS, **settings)(*tokens, *weights)


def tensor_pieces(parameter: nnx.Variable, axis: int) -> int:
    """Equal pieces into which the axis of a parameter is split over `tensor`."""
    if not has_several_devices() or _is_explicit():
        return 1
    sizes = _automatic_sizes()
    entry = rules.parameter_spec(parameter.shape, rules.names_of(parameter), sizes)[axis : axis + 1]
    return sizes[rules.TENSOR] if rules.TENSOR in jax.tree.leaves(entry) else 1


def split_columns(table: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The table with its columns split over the memory axis, where there is one."""
    return place(table, rules.COLUMNS) if has_memory_axis() else table


def committed_as(tree: Tree, like: Any) -> Tree:
    """A tree of new arrays, committed to the device that those of another tree are committed to, if it is a single one.

    Without that, a step that takes and returns both would be compiled twice: it returns all of them committed.
    """
    arrays = [leaf for leaf in jax.tree.leaves(like) if not isinstance(leaf, Tracer)]
    places = {array.sharding for array in arrays if isinstance(array, jax.Array) and array.committed}
    is_one = len(places) == 1 and isinstance(next(iter(places)), SingleDeviceSharding)
    return jax.device_put(tree, *places) if is_one else tree


def split_tokens(array: Array) -> Array:
    """An array with tokens or sequences in front, split over all devices, where there is a mesh."""
    return place(array, rules.TOKENS) if has_memory_axis() else array


def gathered(weights: Weights, dtype: DTypeLike | None = None) -> Weights:
    """Weights (a module, or arrays) gathered over `data` and `memory` for the time of their use, where there is a mesh.

    What the rules split over `tensor` stays split. Matrices are cast to dtype before they are sent. Under an Explicit
    mesh the layout of weights is their owner's affair. Gradients go through it backwards only (`jax.grad`, not
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
    """The array in a layout; its gradient is left in any.

    The transpose of a plain constraint would ask for the gathered gradient on every device, and where XLA does not see
    that only a piece is kept it would be summed everywhere.
    """
    return jax.lax.with_sharding_constraint(weight, spec)


_gathered.defvjp(lambda spec, weight: (_gathered(spec, weight), None), lambda spec, _, gradient: (gradient,))


def replicate(array: Array) -> Array:
    """The array on every device, so that every process can read it."""
    return array if jax.sharding.get_abstract_mesh().empty else place(array, rules.REPLICATED)


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


def over_mesh(function: Callable, in_specs: Any, out_specs: Any, **settings: Hashable) -> Callable[..., Any]:
    """shard_map over the ambient mesh. Collectives' results are not checked for their types: kernels carry none.

    The function is one of a module, with settings as keyword arguments, and specs are tuples: calls that agree in them
    share one compiled program, under `jax.jit` one trace. A closure would be compiled at every call, and kept.

    Under an Auto mesh `tensor` stays automatic. What is `alike_over_tensor` is not split over it inside: devices of a
    tensor group do the same work on the same tokens, with no collective between them. (A manual axis would cost one for
    each gradient: without types, shard_map cannot know that these are equal, and sums them up.) For a memory that means
    that a group reads the rows of its tokens on each of its devices; in return the replicas of a table see all picks as
    it is, and row updates need no collective over `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = {rules.TENSOR} if mesh.shape.get(rules.TENSOR, 1) > 1 and not _is_explicit() else set()
    manual = frozenset(mesh.axis_names) - set(mesh.manual_axes) - left
    mapped = _mapped(function, mesh, manual, in_specs, out_specs, tuple(settings.items()))

    def lay_out(spec: P, argument):
        # An Explicit mesh does not move arrays by itself.
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
    """shard_map over axes of the mesh, jitted: outside of jax.jit it does not know custom gradients."""
    run = partial(function, **dict(settings))
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.jit(jax.shard_map(run, mesh=mesh, axis_names=set(axes), check_vma=False, **specs))


def alike_over_tensor(function: Callable) -> Callable:
    """The function, with arguments, results and their gradients replicated over `tensor`, where the mesh has it.

    It is for what is left to XLA inside `over_mesh`, or on a mesh of `tensor` alone. XLA would carry the layout of a
    neighbouring projection into it: split a table by columns, and gather all of it after every update.
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
    """The function itself; under an Explicit mesh automatic inside, its results split in front like `like`."""
    return jax.sharding.auto_axes(function, out_sharding=_front(like)) if _is_explicit() else function


def unsharded_update(function: Callable, state: Any) -> Callable:
    """The function itself; under an Explicit mesh automatic inside, its results laid out like the state."""
    if not _is_explicit():
        return function
    return jax.sharding.auto_axes(
        function, out_sharding=jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, state)
    )


def _front(array: Array) -> P:
    """How the first axis is split, by its type under an Explicit mesh."""
    return P(*jax.typeof(array).sharding.spec[:1]) if array.ndim > 1 else P()


def _is_explicit() -> bool:
    """Whether the ambient mesh is Explicit."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def place(array: Array, spec: P) -> Array:
    """The array in the given layout: a demand under an Explicit mesh, a constraint under an Auto one."""
    array = checked(array, spec)
    if _is_explicit():
        return jax.sharding.reshard(array, spec)
    return jax.lax.with_sharding_constraint(array, spec)


def checked(array: Array, spec: P) -> Array:
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
