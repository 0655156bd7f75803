"""Row-sparse training of any Flax NNX model with memory layers, in the style of `nnx.value_and_grad`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.graphlib import is_node
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from memjax.config import checks
from memjax.memory.lookup import LookupLayer, Recording
from memjax.memory.read import TableRead, row_gradients, zero_perturbation
from memjax.memory.row_optimizer import RowOptimizer
from memjax.memory.table import TableRows, ValueTable
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.ops.table import Table
from memjax.sharding.axes import committed_as, split_columns
from memjax.sharding.rules import is_variable

DENSE = nnx.All(nnx.Param, nnx.Not(TableRows))
"""The parameters with a dense gradient."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients of a model. They can be added (also by `sum`) and scaled, to accumulate micro-batches.

    Gradients of tables are kept as factors, so functions over all leaves, such as `optax.tree.norm`, are meaningless;
    use `Optimizer.grad_norm` instead.
    """

    dense: Any
    """Gradient of the dense parameters, an `nnx.State`."""
    tables: dict[str, list[RowGradient]]
    """Row gradients of the tables, by their path in the model."""

    def __add__(self, other: "Gradients") -> "Gradients":
        """The gradient of the sum of two losses."""
        if not isinstance(other, Gradients):
            return NotImplemented
        tables = {name: rows + other.tables[name] for name, rows in self.tables.items()}
        return Gradients(jax.tree.map(jnp.add, self.dense, other.dense), tables)

    def __radd__(self, zero: int) -> "Gradients":
        """0 + gradients, with which `sum` starts."""
        return self if zero == 0 else NotImplemented

    def __mul__(self, factor: ArrayLike) -> "Gradients":
        """The gradient of the loss times a number."""
        if isinstance(factor, Gradients):
            return NotImplemented
        scaled = lambda array: array * jnp.asarray(factor, array.dtype)
        tables = {name: [row.scaled(factor) for row in rows] for name, rows in self.tables.items()}
        return Gradients(jax.tree.map(scaled, self.dense), tables)

    __rmul__ = __mul__

    def __neg__(self) -> "Gradients":
        """The gradient of the negative loss."""
        return self * -1

    def __sub__(self, other: "Gradients") -> "Gradients":
        """The gradient of the difference of two losses."""
        return self + -other

    def __truediv__(self, number: ArrayLike) -> "Gradients":
        """The gradient of the loss divided by a number."""
        return self * (1 / number)

    def without_padding(self, token_mask: Bool[Array, "*b"]) -> "Gradients":
        """The gradients without the picks of padding; all tables must have been read by exactly these tokens.

        Padding has a gradient of zero, but rows with a gradient of zero still count as read: their moments decay.
        """
        mask, beyond = token_mask.reshape(-1), jnp.iinfo(jnp.int32).max
        tables = {name: [row.without_padding(mask, beyond) for row in rows] for name, rows in self.tables.items()}
        return dataclasses.replace(self, tables=tables)


def value_and_grad(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., tuple[Any, Gradients]]:
    """Like `nnx.value_and_grad(loss_fn)`, with row gradients in place of dense gradients of the tables.

    `loss_fn(model, *args, **kwargs)` calls the model's memory layers as usual; their reads are recorded automatically,
    also if layers share a table, under `nnx.remat`, on a mesh, and in a `memjax.Decoder`. `memjax.Optimizer` applies
    the gradients (those of tables are kept as factors, which `nnx.Optimizer` cannot apply):

        loss, gradients = memjax.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, gradients)

    The loss function is traced twice, first for the shapes of the reads. Layers must be called as a whole
    (`layer(x, table)`), and their tables must belong to the model. Layers inside `nnx.scan` or `nnx.vmap` are refused.

    Args:
        loss_fn: returns a scalar, or with has_aux a pair of a scalar and anything else.
        has_aux: whether loss_fn returns such a pair.

    Returns:
        A function with the arguments of `loss_fn` that returns its result and the Gradients.

    Raises:
        TypeError: the first argument is not a model, or one of its tables is read-only.
        ValueError: a table of the model was not read, a table of something else was, or layers are stacked.
    """

    def differentiate(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, Gradients]:
        if not is_node(model):
            raise TypeError(
                f"the first argument of loss_fn must be the model, an nnx.Module; found {type(model).__name__}"
            )
        graphdef, tables, dense, rest = nnx.split(model, TableRows, DENSE, ...)

        def run(dense: nnx.State, perturbations: dict[str, Any]) -> tuple[Array, tuple[Any, dict, nnx.State]]:
            copy = nnx.merge(graphdef, tables, dense, rest, copy=True)
            for name, table in _named(copy, ValueTable):
                table.name = name
            layers = dict(_named(copy, LookupLayer))
            for name, layer in layers.items():
                layer.recording = Recording(perturbations.get(name, ()))
            value = loss_fn(copy, *args, **kwargs)
            if has_aux and not (isinstance(value, tuple) and len(value) == 2):
                raise TypeError(f"with has_aux loss_fn must return a pair, (loss, aux); found {type(value).__name__}")
            reads = {name: layer.recording.reads.get_value() for name, layer in layers.items()}
            for layer in layers.values():
                del layer.recording
            loss: Any = value[0] if has_aux else value
            return loss, (value, reads, nnx.state(copy, nnx.Not(nnx.Param)))

        rows = {name: _trainable(name, table) for name, table in _named(model, ValueTable)}
        shapes = jax.eval_shape(lambda dense: run(dense, {})[1][1], dense)
        _check_read(rows, shapes)
        perturbations = jax.tree.map(
            lambda read: _perturbation(read, rows[read.table]), shapes, is_leaf=lambda leaf: isinstance(leaf, TableRead)
        )
        (_, (value, reads, after)), (gradient, cotangents) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
            dense, perturbations
        )
        nnx.update(model, after)
        return value, Gradients(gradient, row_gradients(_by_call(reads), _by_call(cotangents)))

    return differentiate


class Optimizer(nnx.Module):
    """An optax transformation for a model's dense parameters, and a row optimizer for its tables."""

    def __init__(
        self,
        model: nnx.Module,
        *,
        dense: optax.GradientTransformation | optax.MultiSteps,
        tables: RowOptimizer,
        max_grad_norm: float | None = None,
    ):
        """The optimizer before the first step.

        Args:
            model: the model, including the tables that its memory layers read.
            dense: the transformation of all parameters but the tables. Clipping inside it sees only their gradients.
            tables: the optimizer of the rows that were read.
            max_grad_norm: gradients are scaled so that their global norm, tables included, is at most this, as
                `optax.clip_by_global_norm` does under plain autodiff. It costs another pass over the row gradients and
                their rows, and temporarily one number per row of the tables.

        Raises:
            TypeError: dense is not an optax transformation, tables is not a RowOptimizer, or a table is read-only.
            ValueError: max_grad_norm is not a positive finite number.
        """
        # Checked by methods, because `optax.MultiSteps` is not a GradientTransformation.
        if not all(callable(getattr(dense, method, None)) for method in ("init", "update")):
            raise TypeError(
                f"dense must be an optax transformation such as optax.adam(1e-3), found {type(dense).__name__}"
            )
        if not isinstance(tables, RowOptimizer):
            raise TypeError(f"tables must be a memjax.RowOptimizer, found {type(tables).__name__}")
        checks.refuse(checks.finite(max_grad_norm=max_grad_norm) or checks.positive(max_grad_norm=max_grad_norm))
        tx: Any = dense
        self.tx, self.row_optimizer, self.max_grad_norm = tx, tables, max_grad_norm
        states = {name: tables.init(_trainable(name, table)) for name, table in _named(model, ValueTable)}
        state = (
            jnp.zeros((), jnp.int32),
            dense.init(nnx.to_pure_dict(nnx.state(model, DENSE))),
            jax.tree.map(split_columns, states),
        )
        step, dense_state, table_state = committed_as(state, nnx.state(model, nnx.Param))
        self.step, self.dense_state, self.table_state = (
            nnx.OptState(step),
            _variables(dense_state),
            _variables(table_state),
        )

    def update(self, model: nnx.Module, gradients: Gradients, *, ok: ArrayLike = True, **extra: Any) -> None:
        """Takes one step; it is in place inside a jitted function that donates model and optimizer.

        Args:
            model: the model given to `__init__`; its parameters are updated.
            gradients: from `memjax.value_and_grad`.
            ok: False leaves model and optimizer unchanged, for example if the loss is NaN.
            **extra: further arguments of the optax transformation, such as `value=loss`.

        Raises:
            TypeError: gradients are of another function.
        """
        _check_gradients(gradients)
        write = ok & _true_after(gradients.dense)
        if self.max_grad_norm is not None:
            norm = jnp.sqrt(self._squared_norm(model, gradients, write))
            gradients = gradients * jnp.minimum(1, self.max_grad_norm / norm)
        state, before = nnx.state(model, DENSE), _values(self.dense_state)
        params = nnx.to_pure_dict(state)
        tx = optax.with_extra_args_support(self.tx)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, after = tx.update(nnx.to_pure_dict(gradients.dense), before, params, **extra)
            updated = optax.apply_updates(params, updates)
        keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
        nnx.replace_by_pure_dict(state, keep(updated, params))
        nnx.update(model, state)
        _assign(self.dense_state, keep(after, before))
        table_state = _values(self.table_state)
        for name, table in _named(model, ValueTable):
            rows, table_state[name] = self.row_optimizer.update(
                name,
                table.rows[...],
                table_state[name],
                gradients.tables[name],
                step=self.step.get_value(),
                ok=write,
            )
            table.rows.set_value(rows)
        _assign(self.table_state, table_state)
        self.step.set_value(self.step.get_value() + jnp.asarray(ok, jnp.int32))

    def grad_norm(self, model: nnx.Module, gradients: Gradients) -> Float[Array, ""]:
        """The Euclidean norm of all gradients, of dense parameters and tables, as `optax.tree.norm` defines it.

        It costs as much as `max_grad_norm`. In a program that updates the model, call it before `update`: the rows pass
        through the measurement, so that they are not copied. Call it in the jitted step, with the model as an argument;
        elsewhere each table is copied.

        Raises:
            TypeError: gradients are of another function.
        """
        _check_gradients(gradients)
        return jnp.sqrt(self._squared_norm(model, gradients, _true_after(gradients.dense)))

    def _squared_norm(self, model: nnx.Module, gradients: Gradients, ok: ArrayLike) -> Array:
        """The squared norm of all gradients; if ok is false, tables are not measured."""
        squared = _sum_of_squares(gradients.dense)
        for name, table in _named(model, ValueTable):
            rows, of_table = self.row_optimizer.squared_norm(table.rows[...], gradients.tables[name], ok=ok)
            table.rows.set_value(rows)
            squared += of_table
        return squared


def _check_gradients(gradients: Gradients) -> None:
    if not isinstance(gradients, Gradients):
        raise TypeError(f"gradients must come from memjax.value_and_grad, found {type(gradients).__name__}")


def _true_after(dense: Any) -> Bool[Array, ""]:
    """Always true (even for NaN), but depends on the dense gradient.

    A table write with it as `ok` is scheduled after the backward pass, so that XLA need not copy the table.
    """
    return ~(_sum_of_squares(dense) < 0)


def _sum_of_squares(tree: Any) -> Array:
    leaves = jax.tree.leaves(tree)
    squares = [jnp.sum(jnp.square(leaf.astype(accumulator(leaf.dtype)))) for leaf in leaves]
    return sum(squares, start=jnp.zeros(()))


def _variables(tree: Any) -> Any:
    """A variable for every array, so that code which saves the state of modules finds them by name."""
    return nnx.data(jax.tree.map(nnx.OptState, tree))


def _values(variables: Any) -> Any:
    return jax.tree.map(lambda variable: variable.get_value(), variables, is_leaf=is_variable)


def _assign(variables: Any, values: Any) -> None:
    jax.tree.map(lambda variable, value: variable.set_value(value), variables, values, is_leaf=is_variable)


def _named(model: nnx.Module, kind: type) -> Iterator[tuple[str, Any]]:
    """Yields the path and the module of every module of a kind, each once."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, kind):
            yield ".".join(map(str, path)) or type(module).__name__, module


def _trainable(name: str, table: ValueTable) -> Float[Array, "n d"]:
    """The rows of a table; TypeError if it is read-only."""
    rows = table.table
    if isinstance(rows, Table):
        raise TypeError(
            f"the table {name} is read-only, {rows.describe()}: it cannot be trained; load it without table_format and "
            "table_place"
        )
    return rows


def _check_read(rows: dict[str, Any], reads: dict[str, Any]) -> None:
    """Raises ValueError for a table that would not be trained or is not the model's, and for stacked layers."""
    if stacked := [
        name for name, calls in reads.items() for of_call in calls for read in of_call if read.indices.ndim != 2
    ]:
        raise ValueError(
            f"the layers {stacked} are stacked, as by nnx.vmap or nnx.scan, and cannot be trained row by row: create "
            "them one by one, in a list, or use nnx.value_and_grad"
        )
    found = {read.table for calls in reads.values() for of_call in calls for read in of_call}
    if foreign := found - rows.keys():
        raise ValueError(f"a table that is read must belong to the model; it has {sorted(rows)}, not {sorted(foreign)}")
    if unread := rows.keys() - found:
        raise ValueError(
            f"no layer of the model read the tables {sorted(unread)} in loss_fn, so they would not be trained: call "
            "the layers themselves, as layer(x, table), outside of nnx.scan and nnx.vmap"
        )


def _perturbation(read: TableRead, rows: Any) -> Array:
    tokens, picks = read.indices.shape
    return zero_perturbation("dot" if read.weights is None else "bag", tokens, picks, rows)


def _by_call(by_layer: dict[str, Any]) -> dict[str, Any]:
    """Flattens what layers hold for each call, keyed by layer and call."""
    return {f"{name} {number}": found for name, calls in by_layer.items() for number, found in enumerate(calls)}
