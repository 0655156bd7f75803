"""The device mesh, and where every part of the state and the batch lives on it."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.config.run import RunConfig
from memjax.errors import ConfigError
from memjax.sharding.axes import COLUMNS, DATA, MEMORY


def make_mesh(config: RunConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh of a run over the given devices (default: all of them); one device is a 1 x 1 mesh.

    Raises:
        ConfigError: the devices do not fit the mesh, or the batch does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    memory = config.mesh.memory
    data = config.mesh.data or max(1, len(devices) // memory)
    if data * memory != len(devices):
        raise ConfigError(
            [
                f"mesh: data={data} x memory={memory} needs {data * memory} devices, found {len(devices)}; "
                f"set mesh.data={max(1, len(devices) // memory)} or start with other devices"
            ]
        )
    batch_size, per_device = config.data.batch_size, config.train.grad_accum_steps * len(devices)
    if batch_size % per_device:
        raise ConfigError(
            [
                f"data.batch_size={batch_size} must be a multiple of train.grad_accum_steps x devices = "
                f"{config.train.grad_accum_steps} x {len(devices)}; try {-(-batch_size // per_device) * per_device}"
            ]
        )
    return jax.make_mesh((data, memory), (DATA, MEMORY), axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shardings that keep every array whole on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def fully_sharded(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shardings that give every device a piece of every matrix: of its first axis that can be cut evenly.

    It is cut over all devices, or over one axis of the mesh where that is all that can be. Pieces of the first axis lie
    one behind the other in memory, so that sending them takes no transposition. Vectors and scalars stay whole: they
    are small, and sending them costs more than keeping them.
    """

    def spec(shape: tuple[int, ...]) -> P:
        if len(shape) < 2:
            return P()
        for names in ((DATA, MEMORY), (DATA,), (MEMORY,)):
            devices = math.prod(mesh.shape[name] for name in names)
            for axis, length in enumerate(shape):
                if length % devices == 0:
                    return P(*[None] * axis, names)
        return P()

    return jax.tree.map(lambda array: NamedSharding(mesh, spec(array.shape)), tree)


def by_columns(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shardings of tables and their state: columns over the memory axis, scalars everywhere."""
    return jax.tree.map(lambda array: NamedSharding(mesh, COLUMNS if array.ndim == 2 else P()), tree)


def put_batch(mesh: Mesh, batch: dict[str, Any], spec: P) -> dict[str, jax.Array]:
    """A batch, which every process has whole, on the devices: each process gives its own devices their part."""
    sharding = NamedSharding(mesh, spec)
    return {name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__) for name, rows in batch.items()}
