"""The stateless part of training: the model's structure and the optimizers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from memjax.config.run import RunConfig
from memjax.memory.row_optimizer import RowOptimizer
from memjax.models.counts import training_flops
from memjax.models.decoder import layer_name
from memjax.models.parts import DecoderParts, Tables
from memjax.runs.layout import widened
from memjax.sharding.mesh import by_columns, of_parameters, replicated
from memjax.training import spikes
from memjax.training.optimizer import make_optimizer, make_schedule
from memjax.training.row_optimizer import DenseTableOptimizer, make_table_optimizer
from memjax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """The model's structure and the optimizers: everything that stays the same throughout a run."""

    config: RunConfig
    parts: DecoderParts
    optimizer: optax.GradientTransformation
    table_optimizer: RowOptimizer | DenseTableOptimizer

    @classmethod
    def of(cls, config: RunConfig, *, implementation: str | None = None) -> "TrainProgram":
        """The program of a config; `implementation` is that of the memory's operations."""
        attention = None if config.attention == "auto" else config.attention
        parts = DecoderParts.of(config.model, implementation=implementation, attention=attention)
        steps, seed = config.train.steps, config.run.seed
        table = config.optim.table
        schedule, collective = make_schedule(table, steps), config.mesh.row_grad_reduce
        table_optimizer = make_table_optimizer(
            table, schedule, seed=seed, collective=collective, implementation=implementation
        )
        return cls(config, parts, make_optimizer(config.optim, steps, parts.abstract_params), table_optimizer)

    def init(self, key: Array, mesh: Mesh) -> TrainState:
        """The state before the first step; arrays are initialised sharded, so no device holds a full table."""
        shardings = self.shardings(mesh)
        return self.place(self.parts.init(key, (shardings.params, shardings.tables)), shardings)

    def place(self, arrays: tuple[nnx.State, Tables], shardings: TrainState) -> TrainState:
        """`begin` on the devices. The arrays are donated, because two copies of the tables might not fit."""
        return jax.jit(self.begin, donate_argnums=(0, 1), out_shardings=shardings)(*arrays)

    def begin(self, params: nnx.State, tables: Tables) -> TrainState:
        """The state before the first step, starting from the given arrays."""
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            healthy=jnp.ones((), bool),
            params=params,
            opt_state=self.optimizer.init(params),
            tables=tables,
            table_state={name: self.table_optimizer.init(rows) for name, rows in tables.items()},
            reads=self.no_reads(),
            ema=jax.tree.map(jnp.zeros_like, widened(params)) if self.config.optim.ema_decay is not None else None,
            recent=spikes.none_yet() if self.config.optim.skip_step_sigma is not None else None,
        )

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate of the dense parameters, by step."""
        return make_schedule(self.config.optim, self.config.train.steps)

    @property
    def flops_per_token(self) -> int:
        """The training arithmetic by which runs are compared."""
        length, frozen = self.config.data.sequence_length, self.config.optim.freeze_dense
        return training_flops(self.parts, length, freeze_dense=frozen).total

    def no_reads(self) -> dict[str, Array]:
        """Read counters at zero."""
        lookups = self.config.model.lookups
        return {layer_name(layer): jnp.zeros(lookup.num_slots, jnp.int32) for layer, lookup in lookups.items()}

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The shapes of the state."""
        return jax.eval_shape(self.begin, self.parts.abstract_params, self.parts.abstract_tables)

    def shardings(self, mesh: Mesh | AbstractMesh) -> TrainState:
        """The sharding of every array of the state.

        Tables and their state are sharded by columns, dense parameters and theirs by `dense_shardings`; the rest is
        replicated.
        """
        state = self.abstract_state
        return dataclasses.replace(
            replicated(mesh, state),
            params=self.dense_shardings(mesh, state.params),
            opt_state=self.dense_shardings(mesh, state.opt_state),
            tables=by_columns(mesh, state.tables),
            table_state=by_columns(mesh, state.table_state),
            ema=self.dense_shardings(mesh, state.ema),
        )

    def dense_shardings(self, mesh: Mesh | AbstractMesh, tree: Any) -> Any:
        """Shardings of a tree like that of the dense parameters.

        They are sharded over `tensor` by their logical axes, and over `data` and `memory` as `mesh.dense` says.
        """
        return of_parameters(mesh, tree, fully_sharded=self.config.mesh.dense == "sharded")
