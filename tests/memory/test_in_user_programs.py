"""The layers in other programs: inside a user's `jax.shard_map`, meshes and layouts."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memjax
from memjax.memory.layer import MemoryLayer
from memjax.memory.peer import PEERLayer
from memjax.memory.table import TableRows, ValueTable

DIM = 8
SIZES: dict[str, Any] = {"num_keys": 4, "num_heads": 2, "top_k": 2, "key_dim": 4}
THREE = pytest.param(("data", "memory", "tensor"), marks=pytest.mark.slow)


class Both(nnx.Module):
    """A memory layer and a PEER layer, one after the other."""

    def __init__(self, rngs):
        self.table, self.inputs, self.outputs = (ValueTable(16, DIM, rngs=rngs) for _ in range(3))
        self.memory, self.experts = MemoryLayer(DIM, **SIZES, rngs=rngs), PEERLayer(DIM, **SIZES, rngs=rngs)

    def __call__(self, x):
        x = x + self.memory(x, self.table)
        return x + self.experts(x, self.inputs, self.outputs)


def draw(*batch):
    return Both(nnx.Rngs(0)), jnp.asarray(np.random.default_rng(0).normal(size=(*batch, DIM)), jnp.float32)


def loss_and_gradient(model, x, reduce=lambda loss: loss):
    return jax.value_and_grad(lambda model: reduce(jnp.sum(jnp.sin(model(x)))))(model)


def assert_close(got, expected):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [("i", "j"), ("data", "memory"), ("memory",), THREE], ids=str)
def test_layers_inside_a_users_shard_map_with_its_checks_on(names):
    model, x = draw(8)
    shape = {1: (4,), 2: (2, 2), 3: (1, 2, 2)}[len(names)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:4])
    local = lambda model, x: loss_and_gradient(model, x, lambda loss: jax.lax.psum(loss, names))
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(names)), out_specs=P()))
    assert_close(mapped(model, x), jax.jit(loss_and_gradient)(model, x))


@pytest.mark.parametrize(
    ("names", "manual"),
    [
        (("data", "memory", "tensor"), ()),
        pytest.param(("data", "tensor", "model"), (), marks=pytest.mark.slow),
        pytest.param(("memory", "data", "context"), (), marks=pytest.mark.slow),
        (("data", "memory", "tensor"), ("data",)),
    ],
    ids=str,
)
def test_a_third_axis_changes_nothing(names, manual):
    model, x = draw(8)
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices())
    run = loss_and_gradient
    if manual:
        local = lambda model, x: loss_and_gradient(model, x, lambda loss: jax.lax.psum(loss, manual))
        run = lambda model, x: jax.shard_map(local, in_specs=(P(), P(manual)), out_specs=P(), axis_names={*manual})(
            model, x
        )
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*jax.device_put((model, x), NamedSharding(mesh, P())))
    assert_close(got, jax.jit(loss_and_gradient)(model, x))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_the_memory_axis_alone_is_like_any_other(axis_type):
    model, x = draw(8)
    mesh = jax.make_mesh((4,), ("memory",), axis_types=(axis_type,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        got = jax.jit(loss_and_gradient)(*jax.device_put((model, x), NamedSharding(mesh, P())))
    assert_close(got, jax.jit(loss_and_gradient)(model, x))


@pytest.mark.parametrize("names", [("data", "model"), ("data", "memory"), THREE], ids=str)
@pytest.mark.parametrize("layout", [P(None, "data"), P("data", None, None)], ids=str)
def test_layouts_of_batch_and_table_under_an_explicit_mesh(names, layout):
    model, x = draw(4, 4)
    expected = jax.jit(loss_and_gradient)(model, x)
    shape = (2, 2, 2)[: len(names)]
    devices = jax.devices()[: 2 ** len(names)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(names), devices=devices)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, NamedSharding(mesh, P()))
        for table in (model.table, model.inputs, model.outputs):
            table.rows.set_value(jax.device_put(table.rows[...], NamedSharding(mesh, P(None, names[1]))))
        x = jax.device_put(x, NamedSharding(mesh, layout))
        out = jax.jit(lambda model, x: model.memory(x, model.table))(model, x)
        got = jax.jit(loss_and_gradient)(model, x)
    assert out.sharding.is_equivalent_to(x.sharding, out.ndim)
    assert got[1].table.rows[...].sharding.spec == P(None, names[1])
    assert_close(got, expected)


@pytest.mark.parametrize("layers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_table_shared_by_unrolled_layers_holds_one_gradient_under_plain_autodiff(layers):
    table = ValueTable(64**2, 32, rngs=nnx.Rngs(0))
    sizes: dict[str, Any] = {"num_keys": 64, "num_heads": 1, "top_k": 4, "key_dim": 8}
    model = [MemoryLayer(32, **sizes, rngs=nnx.Rngs(number)) for number in range(layers)]
    experts = PEERLayer(32, **sizes, rngs=nnx.Rngs(99))

    def loss(rows, x):
        table = nnx.merge(graphdef, nnx.State({"rows": TableRows(rows)}))
        for layer in model:
            x = x + layer(x, table)
        return jnp.sum(jnp.sin(experts(x, table, table)))

    graphdef, rows, x = nnx.graphdef(table), table.rows[...], jnp.ones((16, 32))
    memory = jax.jit(jax.grad(loss)).lower(rows, x).compile().memory_analysis()
    assert memory is not None
    assert memory.output_size_in_bytes >= rows.nbytes
    assert memory.temp_size_in_bytes < rows.nbytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_steps_where_jax_promotes_no_types(dtype):
    def step(x):
        table = ValueTable(16, DIM, dtype=dtype, rngs=nnx.Rngs(0))
        net = nnx.Dict(layer=MemoryLayer(DIM, **SIZES, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(1)), table=table)
        dense = optax.adamw(0.1, mu_dtype=jnp.float32)
        optimizer = memjax.Optimizer(net, dense=dense, tables=memjax.RowOptimizer(0.1), max_grad_norm=1.0)
        loss, gradients = memjax.value_and_grad(lambda net: net["layer"](x, net["table"]).astype(float).sum())(net)
        optimizer.update(net, (gradients + gradients) / 2, ok=jnp.isfinite(loss))

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(step, jnp.ones((4, DIM), dtype))


def test_layers_are_exported_for_any_number_of_tokens(as_users_call):
    model, x = draw(3)
    exported = jax.export.export(jax.jit(model))(jax.ShapeDtypeStruct(jax.export.symbolic_shape("t, 8"), x.dtype))
    np.testing.assert_allclose(exported.call(x), model(x), rtol=1e-5, atol=1e-6)


def test_numpy_inputs_give_the_same_output(as_users_call, recwarn):
    model, x = draw(3)
    out = model(np.asarray(x, np.float64))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, model(x), rtol=1e-5, atol=1e-6)
    assert not recwarn
