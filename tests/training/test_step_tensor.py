"""Training steps on meshes with a tensor axis equal those on one device, to the last digits in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.checkpoint import Checkpoints
from memjax.runs.layout import DATA_ITER, META
from memjax.sharding.mesh import of_parameters, put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training.start import newest_state
from memjax.training.state import to_items
from memjax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("float64")

# Eight heads, which eight devices can share, and an eps that keeps Adam from amplifying rounding errors.
SIZES = """
--model.dim 32 --model.num_heads 8 --model.num_kv_heads 8 --model.head_dim 4 --model.ffn_dim 32 --model.vocab_size 264
--model.dtype float64 --model.param_dtype float64 --optim.eps 1e-4
"""
MODELS = {
    "dense": "--model.num_layers 1 --model.memory null",
    "biases, norms and tied embeddings": "--model.num_layers 1 --model.memory null --model.attention_bias true "
    "--model.tie_embeddings true --model.qk_norm all_heads --model.norm_placement post --train.grad_accum_steps 2 "
    "--train.remat block",
    "memory": "--model.memory.layers 1 --model.memory.value_dim 512 --model.memory.table_dtype float64 "
    "--optim.table.state_columns 64 --optim.table.moment_dtype float64",
    "experts": "--model.num_layers 1 --model.memory null --model.experts.num_experts 3",
    "peer": "--model.num_layers 1 --model.memory null --model.dim 128 --model.peer.layers 0 "
    "--model.peer.num_keys 8 --model.peer.num_heads 2 --model.peer.top_k 3 "
    "--model.peer.key_dim 8 --model.peer.table_dtype float64 --optim.table.state_columns 64 "
    "--optim.table.moment_dtype float64",
}


@pytest.fixture(scope="module")
def trained(tiny, float64):
    """trained(model, mesh, dense): the result of a few steps, cached."""

    @functools.cache
    def run(model: str, mesh_shape: tuple[int, int, int] = (1, 1, 1), dense: str = "sharded"):
        mesh = "--mesh.data {} --mesh.memory {} --mesh.tensor {}".format(*mesh_shape)
        config = tiny.config(SIZES, MODELS[model], mesh, f"--mesh.dense {dense}")
        return tiny.train(config, tiny.batches(3), mesh_shape)

    return run


def assert_same(state, other):
    for what in ("params", "tables"):
        for one, two in zip(*(jax.tree.leaves(getattr(found, what)) for found in (state, other)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


def case(model, mesh_shape, dense="sharded", *, slow=True):
    name = f"{model}, {'x'.join(map(str, mesh_shape))}, {dense}"
    return pytest.param(model, mesh_shape, dense, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("model", "mesh_shape", "dense"),
    [
        case("dense", (2, 2, 2), slow=False),
        case("dense", (1, 1, 8)),
        case("dense", (4, 2, 1)),
        case("dense", (1, 4, 2), "replicated"),
        case("biases, norms and tied embeddings", (2, 1, 4)),
        case("memory", (2, 2, 2)),
        case("memory", (1, 1, 8), "replicated"),
        case("memory", (4, 2, 1)),
        case("experts", (2, 2, 2)),
        case("peer", (2, 2, 2)),
        case("peer", (1, 1, 8)),
    ],
)
def test_a_run_over_the_tensor_axis_is_that_of_one_device(trained, model, mesh_shape, dense):
    split, alone = trained(model, mesh_shape, dense), trained(model)
    assert alone.losses[-1] != alone.losses[0]
    np.testing.assert_allclose(split.losses, alone.losses, rtol=1e-12)
    assert_same(split.after, alone.after)


@pytest.mark.slow
@pytest.mark.parametrize(("saved_on", "restored_on"), [((2, 2, 2), (4, 2, 1)), ((8, 1, 1), (1, 2, 4))])
def test_a_run_resumes_from_a_mesh_with_another_tensor_axis(tiny, trained, tmp_path, saved_on, restored_on):
    *first, last = tiny.batches(3)
    checkpoints = Checkpoints(tmp_path)
    for mesh_shape in (saved_on, restored_on):
        mesh, config = tiny.mesh(*mesh_shape), tiny.config(SIZES, MODELS["memory"], f"--mesh.memory {mesh_shape[1]}")
        program = tiny.program_of(config)
        with jax.set_mesh(mesh):
            step = make_train_step(program, mesh)
            if mesh_shape == saved_on:
                state, batches = tiny.quick_state(program, mesh), first
            else:
                found = newest_state(program, mesh, checkpoints)
                assert found is not None
                state, batches = found.state, [last]
            for batch in batches:
                state, _ = step(state, put_batch(mesh, tiny.micro_batches(batch, 1), MICRO_BATCHES))
            if mesh_shape == saved_on:
                checkpoints.save(2, to_items(state), {DATA_ITER: {}, META: {}})
                checkpoints.wait()
    assert_same(state, trained("memory").after)


@pytest.mark.slow
def test_a_dense_block_sums_activations_over_tensor_and_gathers_no_weights(tiny):
    program, mesh = tiny.program_of(tiny.config(SIZES, MODELS["dense"])), tiny.mesh(2, 2, 2)
    params = program.parts.abstract_params
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        of_parameters(mesh, params, fully_sharded=False),
    )

    def loss(params, tokens):
        return jnp.sum(jnp.sin(program.parts.merge(params, {}).hidden(tokens).states))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((16, 8), jnp.int32)).compile().as_text()
    assert text is not None
    found = re.findall(
        r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(", text
    )
    assert {name for _, name in found} == {"all-reduce"}
    # Forward: after the embedding, attention and feed-forward layer; backward: before the last two.
    assert sum(shapes.count("f64[4,8,32]") for shapes, _ in found) == 5
