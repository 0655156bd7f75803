"""Devices against the mesh, and where the state lives."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from memjax.command_line import ConfigError
from memjax.training.mesh import make_mesh
from memjax.training.state import Trainer


def test_the_data_axis_takes_what_memory_leaves(tiny):
    config = tiny.config("--mesh.memory 2 --optim.table.state_columns 64")
    assert dict(make_mesh(config).shape) == {"data": 4, "memory": 2}
    assert dict(make_mesh(tiny.config(), jax.devices()[:1]).shape) == {"data": 1, "memory": 1}


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
            "data.batch_size=12 must be a multiple of train.accumulate x devices = 1 x 8; try 16",
        ),
        (
            "--train.accumulate 4",
            8,
            "data.batch_size=16 must be a multiple of train.accumulate x devices = 4 x 8; try 32",
        ),
    ],
)
def test_devices_that_do_not_fit_are_refused_with_a_way_out(tiny, settings, devices, message):
    with pytest.raises(ConfigError) as caught:
        make_mesh(tiny.config(settings), jax.devices()[:devices])
    assert str(caught.value).startswith(message)


def test_tables_and_their_state_are_split_by_columns_and_the_rest_is_everywhere(tiny):
    config = tiny.config("--mesh.memory 4 --optim.table.state_columns 64")
    shardings = Trainer.of(config).shardings(make_mesh(config))
    columns = {sharding.spec for sharding in jax.tree.leaves((shardings.tables, shardings.table_state))}
    assert columns == {P(None, "memory")}
    rest = (shardings.params, shardings.opt_state, shardings.reads, shardings.step, shardings.healthy)
    assert {sharding.spec for sharding in jax.tree.leaves(rest)} == {P()}
