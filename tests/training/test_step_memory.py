"""The compiled step holds no second copy of a table, and searches only once."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.ops.product_key_search.api import product_key_search
from memjax.training.plan.memory import _Planner
from memjax.training.program import TrainProgram
from memjax.training.step import abstract_batch, make_train_step

LARGE = """
--model.dim 64 --model.num_layers 3 --model.num_heads 2 --model.ffn_dim 64 --model.vocab_size 259
--model.memory.layers 0,1 --model.memory.num_keys 1024 --model.memory.num_heads 2 --model.memory.top_k 8
--model.memory.key_dim 16
--model.peer.layers 2 --model.peer.num_keys 1024 --model.peer.num_heads 2
--model.peer.top_k 8 --model.peer.key_dim 16
--data.batch_size 4 --data.sequence_length 32 --mesh.data 1
"""


SHARDED = """
--model.dim 64 --model.num_layers 2 --model.num_heads 2 --model.ffn_dim 256 --model.vocab_size 512
--model.memory.layers 1 --model.memory.num_keys 16 --model.memory.num_heads 2 --model.memory.top_k 4
--model.memory.key_dim 16 --model.memory.value_dim 256 --optim.table.state_columns 64
--data.batch_size 8 --data.sequence_length 16 --mesh.data 2 --mesh.memory 4
"""


def top_k_calls(compiled) -> int:
    """Counts top-k selections in a compiled program: an operation, a call, or a sort of values with their indices."""
    return len(re.findall(r'= \S+ topk\(|custom_call_target="TopK"|= \(f\d+\S+ s32\S+ sort\(', compiled.as_text()))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_step_holds_no_second_table_and_one_search_a_layer(tiny, remat):
    config = load(RunConfig, None, [*LARGE.split(), "--train.remat", remat])
    program, mesh = TrainProgram.of(config), tiny.mesh(1, 1)
    state = program.abstract_state
    batch = {
        name: jax.ShapeDtypeStruct((1, 4, 32), jnp.float32 if name == "loss_mask" else jnp.int32)
        for name in ("tokens", "targets", "segments", "positions", "loss_mask")
    }
    with jax.set_mesh(mesh):
        step: Any = make_train_step(program, mesh)
        compiled = step.lower(state, batch).compile()
    table = 2**20 * 64 * 4
    assert [rows.size * 4 for rows in state.tables.values()] == [table] * 3
    updated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.tables, state.table_state)))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= updated
    assert memory.temp_size_in_bytes < 0.1 * table
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.1 * table

    queries, keys = jax.ShapeDtypeStruct((128, 2, 16), jnp.float32), jax.ShapeDtypeStruct((2, 2, 1024, 8), jnp.float32)
    search = jax.jit(lambda queries, keys: product_key_search(queries, keys, 8)).lower(queries, keys).compile()
    assert top_k_calls(search) > 0
    assert top_k_calls(compiled) == 3 * top_k_calls(search)


@pytest.mark.slow
def test_clipping_tables_copies_none_and_measures_with_the_memory_that_is_planned(tiny):
    table, mesh, temporary, planned = 2**16 * 64 * 4, tiny.mesh(1, 1), {}, {}
    for clip in ("null", "joint"):
        config = tiny.config(f"--model.memory.num_keys 256 --model.memory.value_dim 64 --optim.clip_tables {clip}")
        program = tiny.program_of(config)
        with jax.set_mesh(mesh):
            step: Any = make_train_step(program, mesh)
            compiled = step.lower(program.abstract_state, abstract_batch(config)).compile()
        temporary[clip] = compiled.memory_analysis().temp_size_in_bytes
        planned[clip] = sum(_Planner(config, program, 1).row_update().values())
    assert temporary["joint"] < table / 2
    assert planned["joint"] - planned["null"] == 2**16 * 4  # one number per row
    assert temporary["joint"] - temporary["null"] < 2**20  # plus a chunk of picks


@pytest.mark.slow
def test_row_gradients_do_not_grow_with_the_micro_batches(tiny):
    mesh, temporary = tiny.mesh(1, 1), {}
    for count in (2, 12):
        config = tiny.config(
            f"--mesh.row_grad_reduce all_reduce --data.batch_size {4 * count} --train.grad_accum_steps {count}",
            "--data.sequence_length 64 --train.remat block",
        )
        program = TrainProgram.of(config)
        with jax.set_mesh(mesh):
            step: Any = make_train_step(program, mesh)
            compiled = step.lower(program.abstract_state, abstract_batch(config)).compile()
        temporary[count] = compiled.memory_analysis().temp_size_in_bytes
    # Less than one micro-batch: 256 tokens in 2 layers, each with 6 picks of 8 bytes and 256 columns.
    assert temporary[12] - temporary[2] < 256 * 2 * (6 * 8 + 256 * 4)


def num_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_no_device_is_given_or_draws_or_keeps_all_dense_parameters(tiny):
    config = load(RunConfig, None, SHARDED.split())
    program, mesh = TrainProgram.of(config), tiny.mesh(2, 4)
    state = program.abstract_state
    batch = {
        name: jax.ShapeDtypeStruct((1, 8, 16), jnp.float32 if name == "loss_mask" else jnp.int32)
        for name in ("tokens", "targets", "segments", "positions", "loss_mask")
    }
    with jax.set_mesh(mesh):
        step: Any = make_train_step(program, mesh)
        compiled = step.lower(state, batch).compile()
        drawn = program.init(jax.random.key(0), mesh)
    dense, tables = num_bytes((state.params, state.opt_state)), num_bytes((state.tables, state.table_state))
    matrices = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim >= 2]
    # Each device has an eighth of the matrices, a quarter of the tables, and a few replicated arrays.
    assert num_bytes(matrices) > 0.3 * dense
    share = dense / 8 + tables / 4
    memory = compiled.memory_analysis()
    assert share < memory.argument_size_in_bytes < 1.1 * share
    assert share < sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(drawn)) < 1.1 * share

    text = compiled.as_text()
    # JAX names the all-gather of a parameter after the sharding constraint or, from 0.11 on, after the parameter.
    of_parameters = re.compile(r" all-gather\(.*op_name=\"(state\.params|[^\"]*/sharding_constraint)")
    gathered = [line for line in text.splitlines() if of_parameters.search(line)]
    assert len(gathered) >= len(matrices), "every matrix is gathered for its use"
    # Gradients are reduce-scattered, so the optimizer works on an eighth of a matrix. (On CPUs, XLA compiles this to an
    # all-reduce and a slice.)
    assert re.search(r"f32\[8,256\]\S* sqrt\(", text)
    assert not re.search(r"f32\[(64,256|256,64|64,512|512,64)\]\S* sqrt\(", text)
