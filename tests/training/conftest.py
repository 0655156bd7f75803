"""A decoder small enough to train in a test, batches for it, and training without a run folder."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.run import RunConfig
from memjax.memory import sharded
from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState
from memjax.training.step import make_train_step

SEQUENCES, LENGTH, VOCAB = 16, 8, 259


FLOAT64 = """
--model.dtype float64 --model.param_dtype float64 --model.memory.table_dtype float64 --optim.table.moment_dtype float64
"""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of several steps; all arrays are NumPy arrays except those of `live`."""

    before: TrainState
    after: TrainState
    metrics: list[dict[str, Any]]
    live: TrainState
    """`after` on the devices."""

    @property
    def losses(self) -> np.ndarray:
        return np.array([row["train/loss"] for row in self.metrics])


def ragged_batches(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random batches: rows with several documents, some padding, and very unequal numbers of target tokens."""
    rng, batches = np.random.default_rng(seed), []
    for _ in range(count):
        segments, positions = np.zeros((2, SEQUENCES, LENGTH), np.int32)
        for row in range(SEQUENCES):
            # Some rows are empty, others hold two documents.
            first, second = sorted(rng.integers(0, LENGTH + 1, size=2))
            segments[row, :first], segments[row, first:second] = 1, 2
            positions[row, :first], positions[row, first:second] = np.arange(first), np.arange(second - first)
        tokens, targets = rng.integers(3, VOCAB, size=(2, SEQUENCES, LENGTH)).astype(np.int32)
        learned = rng.random((SEQUENCES, LENGTH)) < rng.random((SEQUENCES, 1))
        batches.append(
            {
                "tokens": tokens,
                "targets": targets,
                "segments": segments,
                "positions": positions,
                "loss_mask": (learned & (segments > 0)).astype(np.float32),
            }
        )
    return batches


def micro_batches(batch: dict[str, np.ndarray], accumulate: int) -> dict[str, np.ndarray]:
    """The batch in the shape that the step expects."""
    return {name: rows.reshape(accumulate, -1, rows.shape[1]) for name, rows in batch.items()}


def mesh_of(data: int, memory: int, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    automatic = (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices("cpu")[: data * memory * tensor]
    return jax.make_mesh((data, memory, tensor), ("data", "memory", "tensor"), axis_types=automatic, devices=devices)


def program_of(config: RunConfig) -> TrainProgram:
    """The program with the row update for large tables; by default, tables this small use the reference."""
    return TrainProgram.of(config, implementation="xla")


def drawn_state(program: TrainProgram, mesh: jax.sharding.Mesh) -> TrainState:
    """The program's own initial state. Call it under the mesh."""
    return program.init(jax.random.key(program.config.run.seed), mesh)


def quick_state(program: TrainProgram, mesh: jax.sharding.Mesh) -> TrainState:
    """A state initialised with NumPy, since compiling the program's own initialisation takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        is_scale = "scale" in jax.tree_util.keystr(path)
        return np.asarray(is_scale + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    def zeros(leaf) -> np.ndarray:
        return np.zeros(leaf.shape, leaf.dtype)

    abstract = program.abstract_state
    state = dataclasses.replace(
        jax.tree.map(zeros, abstract),
        healthy=np.ones((), bool),
        params=jax.tree_util.tree_map_with_path(draw, abstract.params),
        tables=jax.tree_util.tree_map_with_path(draw, abstract.tables),
    )
    return jax.device_put(state, program.shardings(mesh))


def to_numpy(tree: Any) -> Any:
    """Copies the arrays, since a step donates its inputs."""
    return jax.tree.map(np.array, tree)


def train(
    config: RunConfig,
    batches: Sequence[dict[str, np.ndarray]],
    mesh_shape: tuple[int, ...] = (1, 1),
    *,
    start: Callable[[TrainProgram, jax.sharding.Mesh], TrainState] = quick_state,
) -> Trained:
    """Trains one step per batch."""
    mesh, metrics, program = mesh_of(*mesh_shape), [], program_of(config)
    with jax.set_mesh(mesh):
        step, state = make_train_step(program, mesh), start(program, mesh)
        before = to_numpy(state)
        for batch in batches:
            micro = micro_batches(batch, config.train.grad_accum_steps)
            state, row = step(state, put_batch(mesh, micro, MICRO_BATCHES))
            metrics.append(to_numpy(row))
        return Trained(before, to_numpy(state), metrics, state)


def poisoned_bag(layer_number: int):
    """`sharded.bag`, with a NaN in the perturbation's cotangent in call number `layer_number` of a trace."""
    bag, calls = sharded.bag, []

    @jax.custom_vjp
    def identity(perturbation):
        return perturbation

    identity.defvjp(lambda perturbation: (perturbation, None), lambda _, cotangent: (cotangent.at[3, 5].set(jnp.nan),))

    def poisoned(table, indices, weights, perturbation=None, **kwargs):
        calls.append(layer_number)
        poison = len(calls) - 1 == layer_number
        return bag(table, indices, weights, identity(perturbation) if poison else perturbation, **kwargs)

    return poisoned


@pytest.fixture(scope="session")
def tiny(tiny_config) -> SimpleNamespace:
    """The functions of this file, since tests cannot import a conftest."""
    return SimpleNamespace(
        config=lambda *settings, wide=False: tiny_config(FLOAT64 if wide else "", *settings),
        batches=ragged_batches,
        micro_batches=micro_batches,
        mesh=mesh_of,
        program_of=program_of,
        drawn_state=drawn_state,
        quick_state=quick_state,
        to_numpy=to_numpy,
        train=train,
        poisoned_bag=poisoned_bag,
        vocab=VOCAB,
    )


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Disables compiler optimisations, which cost more time than they save."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def float64(quick_compile) -> Iterator[None]:
    """Enables double precision for a module."""
    with jax.enable_x64(True):
        yield
