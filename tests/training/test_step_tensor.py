"""Training steps on meshes with a tensor axis equal those on one device, to the last digits of double precision."""

import functools

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("float64")

# Eight heads of a width that eight devices can share, and rates that do not blow up what is rounded otherwise.
SIZES = """
--model.dim 32 --model.num_heads 8 --model.num_kv_heads 8 --model.head_dim 4 --model.ffn_dim 32 --model.vocab_size 264
--model.dtype float64 --model.param_dtype float64 --optim.eps 1e-4
"""
MODELS = {
    "dense": "--model.num_layers 1 --model.memory null",
    "biases and tied embeddings": "--model.num_layers 1 --model.memory null --model.attention_bias true "
    "--model.tie_embeddings true --train.accumulate 2 --train.remat block",
    "memory": "--model.memory.layers 1 --model.memory.value_dim 512 --model.memory.table_dtype float64 "
    "--optim.table.state_columns 64 --optim.table.moment_dtype float64",
    "experts": "--model.num_layers 1 --model.memory null --model.experts.num_experts 3",
    "expert lookup": "--model.num_layers 1 --model.memory null --model.dim 128 --model.expert_lookup.layers 0 "
    "--model.expert_lookup.num_keys 8 --model.expert_lookup.num_heads 2 --model.expert_lookup.top_k 3 "
    "--model.expert_lookup.key_dim 8 --model.expert_lookup.table_dtype float64 --optim.table.state_columns 64 "
    "--optim.table.moment_dtype float64",
}


@pytest.fixture(scope="module")
def trained(tiny, float64):
    """trained(model, mesh, dense): some steps; runs are kept."""

    @functools.cache
    def run(model: str, mesh_shape: tuple[int, int, int] = (1, 1, 1), dense: str = "sharded"):
        mesh = "--mesh.data {} --mesh.memory {} --mesh.tensor {}".format(*mesh_shape)
        config = tiny.config(SIZES, MODELS[model], mesh, f"--mesh.dense {dense}")
        return tiny.train(config, tiny.batches(3), mesh_shape)

    return run


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
        case("biases and tied embeddings", (2, 1, 4)),
        case("memory", (2, 2, 2)),
        case("memory", (1, 1, 8), "replicated"),
        case("memory", (4, 2, 1)),
        case("experts", (2, 2, 2)),
        case("expert lookup", (2, 2, 2)),
        case("expert lookup", (1, 1, 8)),
    ],
)
def test_a_run_over_the_tensor_axis_is_that_of_one_device(trained, model, mesh_shape, dense):
    split, alone = trained(model, mesh_shape, dense), trained(model)
    assert alone.losses[-1] != alone.losses[0]
    np.testing.assert_allclose(split.losses, alone.losses, rtol=1e-12)
    for what in ("params", "tables"):
        arrays = zip(*(jax.tree.leaves(getattr(run.after, what)) for run in (split, alone)), strict=True)
        for one, other in arrays:
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
