"""Checks of the mesh against the devices, and the sharding of the state."""

import math

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from memjax.errors import ConfigError
from memjax.sharding.mesh import make_mesh, of_parameters
from memjax.training.program import TrainProgram

TENSOR = "--model.num_heads 4 --model.vocab_size 264"


def test_the_data_axis_takes_what_the_others_leave(tiny_config):
    config = tiny_config("--mesh.memory 2 --optim.table.state_columns 64")
    assert dict(make_mesh(config).shape) == {"data": 4, "memory": 2, "tensor": 1}
    assert dict(make_mesh(tiny_config(TENSOR, "--mesh.tensor 4")).shape) == {"data": 2, "memory": 1, "tensor": 4}
    assert dict(make_mesh(tiny_config(), jax.devices()[:1]).shape) == {"data": 1, "memory": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("settings", "devices", "message"),
    [
        ("--mesh.data 4", 8, "mesh: data=4 x memory=1 needs 4 devices, found 8; set mesh.data=8 or start"),
        (
            "--mesh.memory 4 --optim.table.state_columns 64",
            2,
            "mesh: data=1 x memory=4 needs 4 devices, found 2; set mesh.memory=2 or start",
        ),
        (
            "--mesh.memory 4 --optim.table.state_columns 64",
            6,
            "mesh: data=1 x memory=4 needs 4 devices, found 6; set mesh.memory=2 or start",
        ),
        (
            f"{TENSOR} --mesh.tensor 4",
            6,
            "mesh: data=1 x memory=1 x tensor=4 needs 4 devices, found 6; set mesh.tensor=2 or start",
        ),
        (
            "--mesh.data 2 --mesh.memory 2 --optim.table.state_columns 64",
            1,
            "mesh: data=2 x memory=2 needs 4 devices, found 1; set mesh.memory=1 and mesh.data=1 or start",
        ),
        (
            f"{TENSOR} --mesh.tensor 2 --data.batch_size 6",
            8,
            "data.batch_size=6 must be a multiple of train.grad_accum_steps x mesh.data x mesh.memory = 1 x 4; try 8",
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
    state, shardings = program.abstract_state, program.shardings(mesh)
    columns = {sharding.spec for sharding in jax.tree.leaves((shardings.tables, shardings.table_state))}
    assert columns == {P(None, "memory")}
    rest = (shardings.reads, shardings.step, shardings.healthy)
    assert {sharding.spec for sharding in jax.tree.leaves(rest)} == {P()}
    dense, places = (state.params, state.opt_state), (shardings.params, shardings.opt_state)
    for array, sharding in zip(jax.tree.leaves(dense), jax.tree.leaves(places), strict=True):
        here = math.prod(sharding.shard_shape(array.shape))
        # The first axis of the 259 embeddings cannot be split, but their 16 columns can.
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
    assert of_parameters(mesh, jax.ShapeDtypeStruct(shape, "float32"), fully_sharded=True).spec == spec


@pytest.mark.parametrize("dense", ["sharded", "replicated"])
def test_dense_parameters_and_their_optimizer_are_split_over_tensor_by_their_logical_axes(tiny_config, dense):
    config = tiny_config(TENSOR, f"--model.memory.layers 1 --mesh.tensor 2 --mesh.dense {dense}")
    shardings = TrainProgram.of(config).shardings(make_mesh(config))
    others = ("data", "memory") if dense == "sharded" else ()
    down, up = P(("tensor", *others)), P(others or None, ("tensor",))
    trees = [tree for tree in jax.tree.leaves(shardings.opt_state, is_leaf=is_state) if is_state(tree)]
    moments = [tree for tree in trees if isinstance(tree["embed"]["embedding"], nnx.Variable)]
    assert len(moments) == 2, "queries and keys, which are another group, have their own"
    for params in (shardings.params, *moments):
        block, mixer = params["blocks"][0], params["blocks"][1]["memory"]
        found = {
            "vocabulary": params["embed"]["embedding"],
            "heads": block["attention"]["query"]["kernel"],
            "out of heads": block["attention"]["out"]["kernel"],
            "ffn": block["feed_forward"]["gate"]["kernel"],
            "out of ffn": block["feed_forward"]["down"]["kernel"],
            "gate of values": mixer["gate_proj"]["kernel"],
            "values": mixer["value_proj"]["kernel"],
            "norm": block["attention_norm"]["scale"],
        }
        assert {name: jax.tree.leaves(leaf)[0].spec for name, leaf in found.items()} == {
            "vocabulary": down,
            "heads": up,
            "out of heads": down,
            "ffn": up,
            "out of ffn": down,
            "gate of values": up,
            "values": down,
            "norm": P(),
        }
        assert all("tensor" not in str(place.spec) for place in jax.tree.leaves(mixer["keys"]))


def is_state(node):
    return isinstance(node, nnx.State)


def test_replicated_parameters_are_on_every_device(tiny_config):
    config = tiny_config("--mesh.dense replicated")
    shardings = TrainProgram.of(config).shardings(make_mesh(config))
    assert {sharding.spec for sharding in jax.tree.leaves((shardings.params, shardings.opt_state))} == {P()}
