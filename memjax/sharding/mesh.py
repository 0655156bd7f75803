"""The device mesh, and how the state and the batch are sharded over it."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memjax.config.devices import MeshConfig
from memjax.config.run import RunConfig
from memjax.errors import ConfigError
from memjax.sharding import rules


def make_mesh(config: RunConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh of a run over the given devices (default: all of them); one device is a 1 x 1 x 1 mesh.

    Raises:
        ConfigError: the devices do not fit the mesh, or the batch does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    mesh = config.mesh
    data = mesh.data_axis(len(devices))
    if data * mesh.devices_per_replica != len(devices):
        raise ConfigError(
            f"mesh: {mesh.describe(data, '=')} needs {data * mesh.devices_per_replica} devices, found "
            f"{len(devices)}; set {_that_fits(mesh, len(devices))} or start with other devices"
        )
    rows = data * mesh.memory
    batch_size, per_step = config.data.batch_size, config.train.grad_accum_steps * rows
    if batch_size % per_step:
        what = "devices" if mesh.tensor == 1 else "mesh.data x mesh.memory"
        raise ConfigError(
            f"data.batch_size={batch_size} must be a multiple of train.grad_accum_steps x {what} = "
            f"{config.train.grad_accum_steps} x {rows}; try {-(-batch_size // per_step) * per_step}"
        )
    return jax.make_mesh(
        (data, mesh.memory, mesh.tensor), rules.AXES, axis_types=(AxisType.Auto,) * len(rules.AXES), devices=devices
    )


def _that_fits(mesh: MeshConfig, devices: int) -> str:
    """The axes to change, and sizes that use all devices."""
    memory = math.gcd(mesh.memory, devices)
    tensor = math.gcd(mesh.tensor, devices // memory)
    sizes = {"memory": memory, "tensor": tensor, "data": mesh.data and devices // (memory * tensor)}
    return " and ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != getattr(mesh, name))


def abstract_mesh(config: MeshConfig, data_axis: int) -> AbstractMesh:
    """The mesh of `make_mesh` without devices."""
    sizes = (data_axis, config.memory, config.tensor)
    return AbstractMesh(sizes, rules.AXES, axis_types=(AxisType.Auto,) * len(rules.AXES))


def replicated(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shardings that replicate every array."""
    return jax.tree.map(lambda _: NamedSharding(mesh, rules.REPLICATED), tree)


def of_parameters(mesh: Mesh | AbstractMesh, tree: Any, *, fully_sharded: bool) -> Any:
    """Shardings of dense parameters, or of trees like theirs, such as gradients or an optimizer's state.

    See `rules.parameter_spec`; the variables in the tree name their axes.
    """
    sizes = dict(mesh.shape)

    def of_node(node: Any) -> Any:
        names = rules.names_of(node)
        place = lambda array: rules.parameter_spec(array.shape, names, sizes, fully_sharded=fully_sharded)
        return jax.tree.map(lambda array: NamedSharding(mesh, place(array)), node)

    return jax.tree.map(of_node, tree, is_leaf=rules.is_variable)


def by_columns(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shardings of tables and their state: columns over the `memory` axis; scalars are replicated."""
    return jax.tree.map(lambda array: NamedSharding(mesh, rules.COLUMNS if array.ndim == 2 else rules.REPLICATED), tree)


def divisible(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up so that all devices of the mesh get the same number of sequences."""
    return -(-batch_size // mesh.size) * mesh.size


def put_batch(mesh: Mesh, batch: dict[str, Any], spec: PartitionSpec) -> dict[str, jax.Array]:
    """Puts a batch on the devices. Every process has all of it, and gives its own devices their shards."""
    sharding = NamedSharding(mesh, spec)
    return {name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__) for name, rows in batch.items()}
