"""Devices against the mesh, and where the state lives."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from memjax.errors import ConfigError
from memjax.sharding.mesh import fully_sharded, make_mesh
from memjax.training.program import TrainProgram


def test_the_data_axis_takes_what_memory_leaves(tiny_config):
    config = tiny_config("--mesh.memory 2 --optim.table.state_columns 64")
    assert dict(make_mesh(config).shape) == {"data": 4, "memory": 2}
    assert dict(make_mesh(tiny_config(), jax.devices()[:1]).shape) == {"data": 1, "memory": 1}


@pytest.mark.parametrize(
    ("settings", "devices", "message"),
    [
        ("--mesh.data 4", 8, "mesh: data=4 x memory=1 needs 4 devices, found 8; set mesh.data=8"),
        (
            "--mesh.memory 4 --optim.table.state_columns 64",
            2,
            "mesh: data=1 x memory=4 needs 4 devices, found 2; set mesh.data=1",
        ),
        (
            "--mesh.memory 4 --optim.table.state_columns 64",
            6,
            "mesh: data=1 x memory=4 needs 4 devices, found 6; set mesh.data=1",
        ),
        (
            "--data.batch_size 12",
            8,
            "data.batch_size=12 must be a multiple of train.grad_accum_steps x devices = 1 x 8; try 16",
        ),
        (
            "--train.grad_accum_steps 4",
            8,
            "data.batch_size=16 must be a multiple of train.grad_accum_steps x devices = 4 x 8; try 32",
        ),
    ],
)
def test_devices_that_do_not_fit_are_refused_with_a_way_out(tiny_config, settings, devices, message):
    with pytest.raises(ConfigError) as caught:
        make_mesh(tiny_config(settings), jax.devices()[:devices])
    assert str(caught.value).startswith(message)


def test_tables_are_split_by_columns_and_matrices_over_all_devices(tiny_config):
    config = tiny_config("--mesh.memory 4 --optim.table.state_columns 64")
    program, mesh = TrainProgram.of(config), make_mesh(config)
    state, shardings = program.abstract_state(), program.shardings(mesh)
    columns = {sharding.spec for sharding in jax.tree.leaves((shardings.tables, shardings.table_state))}
    assert columns == {P(None, "memory")}
    rest = (shardings.reads, shardings.step, shardings.healthy)
    assert {sharding.spec for sharding in jax.tree.leaves(rest)} == {P()}
    dense, places = (state.params, state.opt_state), (shardings.params, shardings.opt_state)
    for array, sharding in zip(jax.tree.leaves(dense), jax.tree.leaves(places), strict=True):
        here = math.prod(sharding.shard_shape(array.shape))
        # 259 embeddings of 16 numbers: the longer axis cannot be cut.
        assert here == (array.size // 8 if array.ndim >= 2 else array.size), array.shape


@pytest.mark.parametrize(
    ("mesh", "shape", "spec"),
    [
        ((2, 4), (16, 64), P(("data", "memory"))),
        ((2, 4), (259, 16), P(None, ("data", "memory"))),
        ((2, 3), (6, 4), P(("data", "memory"))),
        ((2, 3), (4, 5), P(("data",))),
        ((2, 3), (7, 9), P(None, ("memory",))),
        ((2, 3), (5, 7), P()),
        ((2, 4), (64,), P()),
        ((2, 4), (), P()),
    ],
)
def test_the_first_axis_that_can_be_cut_over_most_devices_is_cut(mesh, shape, spec):
    mesh = jax.sharding.AbstractMesh(mesh, ("data", "memory"))
    assert fully_sharded(mesh, jax.ShapeDtypeStruct(shape, "float32")).spec == spec


def test_replicated_parameters_are_whole_everywhere(tiny_config):
    config = tiny_config("--mesh.dense replicated")
    shardings = TrainProgram.of(config).shardings(make_mesh(config))
    assert {sharding.spec for sharding in jax.tree.leaves((shardings.params, shardings.opt_state))} == {P()}
