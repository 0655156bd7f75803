"""`memjax.value_and_grad` and `memjax.Optimizer` against plain autodiff and the explicit form, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memjax
from memjax import MemoryLayer, PEERLayer, RowOptimizer, RowRule, TableRows, ValueTable, row_update
from memjax.memory.sparse_gradient import row_sparse_value_and_grad
from memjax.ops.row_formats import formats
from memjax.ops.row_update.rules import row_step
from memjax.ops.table import Table

pytestmark = pytest.mark.usefixtures("float64")

DIM, TOKENS, SLOTS = 8, 16, 16
SIZES = {"num_keys": 4, "num_heads": 2, "top_k": 2, "key_dim": 4, "param_dtype": jnp.float64}
TABLES = ("inputs", "outputs", "table")


@pytest.fixture(scope="module")
def float64():
    with jax.enable_x64(True):
        yield


class Block(nnx.Module):
    def __init__(self, rngs):
        self.memory = MemoryLayer(DIM, **SIZES, rngs=rngs)

    def __call__(self, x, table):
        return x + self.memory(x, table)


class Model(nnx.Module):
    """Two blocks that share a table, the first of which runs twice, and a PEER layer."""

    def __init__(self, *, remat=False):
        rngs = nnx.Rngs(0)
        self.table, self.inputs, self.outputs = (ValueTable(SLOTS, DIM, dtype=jnp.float64, rngs=rngs) for _ in TABLES)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.peer, self.remat = PEERLayer(DIM, **SIZES, rngs=rngs), remat
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in (*self.blocks, self.blocks[0]):
            x = run(block, x, self.table)
        self.calls.set_value(self.calls.get_value() + 1)
        return x + self.peer(x, self.inputs, self.outputs)


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def data():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, TOKENS // 2, DIM)))


def assert_same_gradients(gradients, expected):
    """Checks that row gradients sum to the tables' dense gradients, and that all others are equal."""
    for name in TABLES:
        dense = expected[name]["rows"][...]
        assert np.any(dense)
        total = sum(row.dense(SLOTS) for row in gradients.tables[name])
        np.testing.assert_allclose(total, dense, rtol=1e-9, atol=1e-12)
    others = nnx.filter_state(expected, lambda path, _: path[0] not in TABLES)
    for one, other in zip(jax.tree.leaves(gradients.dense), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_are_those_of_plain_autodiff(remat):
    model, (x, y) = Model(remat=remat), data()
    expected_loss, expected = nnx.jit(nnx.value_and_grad(loss_fn))(model, x, y)
    loss, gradients = nnx.jit(memjax.value_and_grad(loss_fn))(model, x, y)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert [len(gradients.tables[name]) for name in TABLES] == [1, 1, 3]
    assert_same_gradients(gradients, expected)
    assert model.calls.get_value() == 2
    assert not hasattr(model.peer, "recording")


@pytest.mark.slow
def test_a_mesh_gives_the_gradients_of_one_device():
    model, (x, y) = Model(), data()
    _, expected = nnx.jit(nnx.value_and_grad(loss_fn))(model, x, y)
    mesh = jax.make_mesh((2, 2), ("data", "memory"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        _, gradients = nnx.jit(memjax.value_and_grad(loss_fn))(nnx.jit(Model)(), x, y)
    assert_same_gradients(jax.tree.map(jnp.asarray, jax.device_get(gradients)), expected)


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch():
    model, (x, y) = Model(), data()
    one = memjax.value_and_grad(loss_fn)
    _, expected = nnx.jit(nnx.value_and_grad(loss_fn))(model, x, y)
    accumulate = nnx.jit(lambda model: sum(one(model, x[i : i + 1], y[i : i + 1])[1] for i in range(2)) / 2)
    assert_same_gradients(accumulate(model), expected)


def test_steps_are_those_of_the_explicit_form():
    x, y = data()
    rule = RowRule(kind="rowwise_adam", state_columns=DIM)
    layer = MemoryLayer(DIM, **SIZES, rngs=nnx.Rngs(1))
    table = ValueTable(SLOTS, DIM, dtype=jnp.float64, rngs=nnx.Rngs(2))
    graphdef, params = nnx.split(layer)
    table_def, adam = nnx.graphdef(table), optax.adam(1e-2)

    def explicit_loss(params, perturbations, table):
        out, reads = nnx.merge(graphdef, params).with_reads(x, table, perturbations=perturbations["memory"])
        return jnp.mean((out - y) ** 2), ({"memory": reads}, None)

    class Net(nnx.Module):
        def __init__(self):
            self.layer, self.table = nnx.clone(layer), nnx.clone(table)

        def __call__(self, x):
            return self.layer(x, self.table)

    net = Net()
    optimizer = memjax.Optimizer(net, dense=optax.adam(1e-2), tables=RowOptimizer(1e-1, rule))

    @nnx.jit
    def step(net, optimizer, ok):
        loss, gradients = memjax.value_and_grad(loss_fn)(net, x, y)
        optimizer.update(net, gradients, ok=ok)
        return loss

    @jax.jit
    def explicit_step(params, state, rows, row_state, number):
        now_table = nnx.merge(table_def, nnx.State({"rows": TableRows(rows)}))
        perturbations = {"memory": layer.zero_perturbations(TOKENS, now_table)}
        (loss, _), gradient, found = row_sparse_value_and_grad(explicit_loss)(params, perturbations, now_table)
        updates, state = adam.update(gradient, state, params)
        now = row_step(1e-1, number)
        return (
            loss,
            optax.apply_updates(params, updates),
            state,
            *row_update(rows, row_state, found["table"], rule, now),
        )

    state, rows, row_state = adam.init(params), table.rows[...], rule.init(SLOTS, DIM, jnp.float64)
    for number in range(3):
        loss, params, state, rows, row_state = explicit_step(params, state, rows, row_state, number)
        np.testing.assert_allclose(step(net, optimizer, True), loss, rtol=1e-12)
    np.testing.assert_allclose(net.table.rows[...], rows, rtol=1e-11)
    for one, other in zip(jax.tree.leaves(nnx.state(net.layer)), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11)

    before = jax.tree.map(np.array, nnx.state((net, optimizer)))
    step(net, optimizer, False)
    jax.tree.map(np.testing.assert_array_equal, nnx.state((net, optimizer)), before)


@pytest.mark.slow
def test_norm_and_clipping_are_those_of_optax_on_all_gradients_of_plain_autodiff():
    (x, y), limit = data(), 1e-3
    plain, net = Model(), Model()
    chain = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(1.0))
    expected = nnx.Optimizer(plain, chain, wrt=nnx.Param)
    found = memjax.Optimizer(
        net, dense=optax.sgd(1.0), tables=RowOptimizer(1.0, RowRule(kind="sgd")), max_grad_norm=limit
    )

    before = jax.tree.map(np.array, nnx.state(plain, nnx.Param))
    for differentiate, model, optimizer in ((nnx.value_and_grad, plain, expected), (memjax.value_and_grad, net, found)):
        gradient_of = differentiate(loss_fn)
        step = lambda model, optimizer, of=gradient_of: optimizer.update(model, of(model, x, y)[1])
        nnx.jit(step)(model, optimizer)
    after = nnx.state(plain, nnx.Param)
    model = Model()
    norm = nnx.jit(lambda model: found.grad_norm(model, memjax.value_and_grad(loss_fn)(model, x, y)[1]))(model)
    dense_norm = nnx.jit(lambda model: optax.tree.norm(nnx.grad(loss_fn)(model, x, y)))(model)
    np.testing.assert_allclose(norm, dense_norm, rtol=1e-9)
    moves = [np.linalg.norm(new - old) for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True)]
    assert np.linalg.norm(moves) == pytest.approx(limit)
    for one, other in zip(*map(jax.tree.leaves, (nnx.state(net, nnx.Param), after)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("as_users_call")
def test_a_norm_to_clip_to_is_positive():
    model, tables = Model(), RowOptimizer(1.0, RowRule(kind="sgd"))
    number = "must be a finite number"
    refused: list[tuple[Any, str]] = [(0.0, "0.0 must be positive"), ("x", f"'x' {number}"), (True, f"True {number}")]
    for norm, rule in refused:
        with pytest.raises(ValueError, match=f"max_grad_norm={rule}"):
            memjax.Optimizer(model, dense=optax.sgd(1.0), tables=tables, max_grad_norm=norm)


class OneLayer(nnx.Module):
    """A memory layer with its own table."""

    def __init__(self, width: int, *, num_keys: int):
        self.table = ValueTable(num_keys**2, width, rngs=nnx.Rngs(0))
        self.layer = MemoryLayer(width, num_keys=num_keys, num_heads=2, top_k=2, key_dim=4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x, self.table)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_step_without_ok_copies_no_table(limit):
    def step(model, optimizer, x):
        optimizer.update(model, memjax.value_and_grad(loss_fn)(model, x, x)[1])

    model, x = OneLayer(64, num_keys=128), jnp.ones((8, 64), jnp.float32)
    tables = RowOptimizer(1.0, implementation="xla")
    optimizer = memjax.Optimizer(model, dense=optax.sgd(1.0), tables=tables, max_grad_norm=limit)
    compiled = nnx.jit(step, donate_argnums=(0, 1)).lower(model, optimizer, x).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < model.table.rows.nbytes / 2


def test_the_step_of_a_model_committed_to_a_device_is_compiled_once(caplog):
    @nnx.jit
    def small_step(model, optimizer, x):
        optimizer.update(model, memjax.value_and_grad(loss_fn)(model, x, x)[1])

    model, x = OneLayer(8, num_keys=4), jnp.ones((8, 8), jnp.float32)
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))  # committed, like a loaded model
    optimizer = memjax.Optimizer(model, dense=optax.adam(1e-3), tables=RowOptimizer(1.0))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(3):
            small_step(model, optimizer, x)
    assert caplog.text.count("Compiling jit(small_step)") == 1


@pytest.mark.usefixtures("as_users_call")
def test_a_rule_that_only_measures_cannot_train():
    kind: Any = "rowwise_norm"
    with pytest.raises(ValueError, match=r"kind='rowwise_norm' is unknown; known: (?!.*norm)rowwise_adam, .*sgd"):
        RowOptimizer(1e-2, RowRule(kind=kind))


def test_tables_that_would_not_be_trained_are_refused():
    model, x = Model(), data()[0]
    by_parts = lambda model: jnp.sum(model.peer.with_reads(x, model.inputs, model.outputs)[0])
    with pytest.raises(ValueError, match=r"no layer of the model read the tables \['inputs', 'outputs', 'table'\]"):
        memjax.value_and_grad(by_parts)(model)
    foreign = ValueTable(SLOTS, DIM, name="foreign", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"must belong to the model; it has .*, not \['foreign'\]"):
        memjax.value_and_grad(lambda model: jnp.sum(model.blocks[0](x, foreign)))(model)


def test_padding_reads_no_row():
    model, (x, y) = Model(), data()
    real = jnp.zeros(x.shape[:2], bool).at[0, :3].set(True)
    _, gradients = nnx.jit(memjax.value_and_grad(loss_fn))(model, x, y)
    kept = gradients.without_padding(real).tables["inputs"][0].dense(SLOTS)
    (row,) = gradients.tables["inputs"]
    expected = np.zeros((SLOTS, DIM))
    for token, pick in np.ndindex(3, row.indices.shape[1]):
        expected[row.indices[token, pick]] += row.weights[token, pick] * row.vectors[token]
    np.testing.assert_allclose(kept, expected, atol=1e-12)


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap], ids=lambda wrap: wrap.__name__)
def test_a_layer_whose_reads_cannot_leave_a_transformation_is_refused_with_what_to_do(wrap):
    model, x = Model(), data()[0]
    with pytest.raises(ValueError, match=r"a MemoryLayer is called inside a transformation .* under nnx.jit"):
        memjax.value_and_grad(lambda model: jnp.sum(wrap(lambda x: model.blocks[0](x, model.table))(x)))(model)


class Net(nnx.Module):
    def __init__(self):
        self.table = ValueTable(SLOTS, DIM, dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.block = Block(nnx.Rngs(1))

    def __call__(self, x):
        return self.block(x, self.table)


def test_gradients_are_subtracted_and_add_to_nothing_else():
    net, x = Net(), jnp.ones((TOKENS, DIM))
    _, gradients = nnx.jit(memjax.value_and_grad(lambda net: jnp.sum(net(x))))(net)
    for leaf in jax.tree.leaves((gradients - gradients).dense):
        np.testing.assert_array_equal(leaf, 0)
    rows = (gradients - gradients * 2).tables["table"]
    expected = sum(row.dense(SLOTS) for row in gradients.tables["table"])
    np.testing.assert_allclose(sum(row.dense(SLOTS) for row in rows), -expected, atol=1e-12)
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = gradients + gradients.dense


def test_transformations_of_optax_that_take_the_loss_get_it():
    net, x = Net(), jnp.ones((TOKENS, DIM))
    dense = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    optimizer = memjax.Optimizer(net, dense=dense, tables=RowOptimizer(0.1))
    loss, gradients = memjax.value_and_grad(lambda net: jnp.sum(net(x)))(net)
    optimizer.update(net, gradients, value=loss)
    assert optimizer.dense_state[1].best_value[...] == loss


def test_transformations_may_be_of_any_class_with_their_methods():
    net, x = Net(), jnp.ones((TOKENS, DIM))
    optimizer = memjax.Optimizer(net, dense=optax.MultiSteps(optax.sgd(0.1), 2), tables=RowOptimizer(0.1))
    loss = lambda net: jnp.sum(net(x))
    before, moved = jax.tree.leaves(nnx.state(net.block)), []
    for _ in range(2):
        optimizer.update(net, memjax.value_and_grad(loss)(net)[1])
        moved.append(any(map(np.any, map(np.subtract, jax.tree.leaves(nnx.state(net.block)), before))))
    assert moved == [False, True]


@pytest.mark.parametrize(
    ("names", "axis_type", "spec"),
    [
        (("dp", "tp"), AxisType.Explicit, P(None, "tp")),
        # A device holds fewer columns of the table than share a state by default.
        (("data", "memory"), AxisType.Auto, P(None, "memory")),
    ],
    ids=str,
)
def test_a_step_on_a_mesh_is_that_of_one_device_and_keeps_the_layout_of_tables(names, axis_type, spec):
    def step(net, x):
        optimizer = memjax.Optimizer(net, dense=optax.sgd(0.1), tables=RowOptimizer(0.1, RowRule(kind="sgd")))
        _, gradients = nnx.jit(memjax.value_and_grad(lambda net, x: jnp.sum(jnp.sin(net(x)))))(net, x)
        nnx.jit(lambda optimizer, net, gradients: optimizer.update(net, gradients))(optimizer, net, gradients)
        return net.table.rows[...]

    x = data()[0]
    expected = step(Net(), x)
    mesh = jax.make_mesh((2, 2), names, axis_types=(axis_type,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        net = Net()
        net.table.rows.set_value(jax.device_put(net.table.rows[...], NamedSharding(mesh, spec)))
        found = step(net, jax.device_put(x, NamedSharding(mesh, P(names[0]))))
        (moment,) = jax.tree.leaves(RowOptimizer(0.1).init(net.table.rows[...]))
        assert moment.shape == (SLOTS, 2 if "memory" in names else 1)
    assert found.sharding == NamedSharding(mesh, spec)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_model_and_optimizer_come_back_from_their_pure_dicts():
    def build():
        net = Net()
        return net, memjax.Optimizer(net, dense=optax.adam(0.1), tables=RowOptimizer(0.1))

    saved = nnx.to_pure_dict(nnx.state(build()))
    definition, state = nnx.split(nnx.eval_shape(build))
    nnx.replace_by_pure_dict(state, jax.tree.map(np.asarray, saved))
    restored = nnx.merge(definition, state)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(restored)), saved)


@pytest.mark.parametrize("number", [np.array, np.float32, np.float64, jnp.float32])
def test_rates_may_be_numbers_of_numpy_and_jax(number):
    assert RowOptimizer(number(0.5)) == RowOptimizer(0.5)
    assert hash(RowOptimizer(number(0.5))) == hash(RowOptimizer(0.5))


def test_a_rate_may_be_an_argument_of_a_compiled_function():
    assert jax.jit(lambda rate: RowOptimizer(rate).rate(0))(0.5) == 0.5


@pytest.mark.parametrize(
    "rate",
    ["1e-3", -1.0, float("nan"), float("inf"), None, True]
    + [np.array(wrong) for wrong in (-1.0, np.nan, True, "1e-3", 1j, [0.1])]
    + [jnp.float32(-1.0)],
)
def test_invalid_rates_are_refused(as_users_call, rate):
    with pytest.raises(ValueError, match=r"learning_rate=.* must be a number that is not negative, or a schedule"):
        RowOptimizer(rate)


@pytest.mark.parametrize("wrong", [{"collective": "sum"}, {"implementation": "cuda"}, {"rule": "sgd"}, {"seed": "0"}])
def test_settings_of_row_optimizers_are_checked(as_users_call, wrong):
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))}="):
        RowOptimizer(0.1, **wrong)


def test_columns_that_share_a_moment_must_be_of_one_device():
    mesh = jax.make_mesh((1, 2), ("data", "memory"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        table = ValueTable(SLOTS, 24, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"state_columns=8 must divide the 12 columns .* set state_columns=4, or"):
            RowOptimizer(0.1, RowRule(state_columns=8)).init(table.rows[...])
        for rule in (RowRule(state_columns=4), RowRule(), RowRule(kind="adam", state_columns=8)):
            state = RowOptimizer(0.1, rule).init(table.rows[...])
            assert {moment.shape for moment in state.values()} == {(SLOTS, 24 if rule.kind == "adam" else 6)}


def test_objects_of_flax_and_optax_are_refused_by_name(as_users_call):
    model, wrong = Model(), optax.sgd(0.1)
    with pytest.raises(TypeError, match=r"tables must be a memjax.RowOptimizer, found GradientTransformation"):
        memjax.Optimizer(model, dense=wrong, tables=wrong)  # pyright: ignore[reportArgumentType]
    for other in (0.1, nnx.Optimizer(model, wrong, wrt=nnx.Param)):
        rule = rf"dense must be an optax transformation such as optax.adam\(1e-3\), found {type(other).__name__}"
        with pytest.raises(TypeError, match=rule):
            memjax.Optimizer(model, dense=other, tables=RowOptimizer(0.1))  # pyright: ignore[reportArgumentType]
    optimizer = memjax.Optimizer(model, dense=wrong, tables=RowOptimizer(0.1))
    for method in (optimizer.update, optimizer.grad_norm):
        with pytest.raises(TypeError, match=r"gradients must come from memjax.value_and_grad, found State"):
            method(model, nnx.state(model))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"must return a pair, \(loss, aux\)"):
        memjax.value_and_grad(loss_fn, has_aux=True)(model, *data())
    with pytest.raises(TypeError, match=r"first argument of loss_fn must be the model, an nnx.Module; found \w*Array"):
        memjax.value_and_grad(lambda x, model: loss_fn(model, x, x))(data()[0], model)


def test_transformations_and_modules_of_flax_take_row_gradients():
    net, x = Net(), jnp.ones((TOKENS, DIM))
    gradients = nnx.jit(memjax.value_and_grad(lambda net: jnp.sum(net(x))))(net)[1]
    doubled = nnx.scan(lambda gradients, _: (gradients * 2, None), length=1)(gradients, None)[0]
    for one, other in zip(jax.tree.leaves(doubled.dense), jax.tree.leaves(gradients.dense), strict=True):
        np.testing.assert_array_equal(one, 2 * other)

    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.gradients = nnx.data(gradients)

    holder = Holder()
    total = nnx.jit(lambda holder: sum(map(jnp.sum, jax.tree.leaves(holder.gradients.dense))))(holder)
    np.testing.assert_allclose(total, sum(map(jnp.sum, jax.tree.leaves(gradients.dense))), rtol=1e-5)
    assert jax.tree.leaves(nnx.state(holder))


def test_tables_that_are_read_only_are_refused():
    net = Net()
    net.table.rows = TableRows(Table.encoded(jnp.ones((SLOTS, DIM), jnp.float32), formats.find("int8")))
    rule = r"the table table is read-only, int8\[16, 8\] in device memory: .* without table_format"
    with pytest.raises(TypeError, match=rule):
        memjax.Optimizer(net, dense=optax.sgd(0.1), tables=RowOptimizer(0.1))
    with pytest.raises(TypeError, match=rule):
        memjax.value_and_grad(lambda net: jnp.sum(net(jnp.ones((TOKENS, DIM)))))(net)


def test_stacked_layers_are_refused_with_what_to_do():
    class Stacked(nnx.Module):
        def __init__(self):
            self.table = ValueTable(SLOTS, DIM, dtype=jnp.float64, rngs=nnx.Rngs(0))
            self.blocks = nnx.vmap(Block)(nnx.Rngs(1).split(2))

        def __call__(self, x):
            table = self.table
            run = nnx.scan(lambda block, x: block(x, table), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return run(self.blocks, x)

    with pytest.raises(ValueError, match=r"the layers \['blocks.memory'\] are stacked, .* nnx.value_and_grad"):
        memjax.value_and_grad(lambda model: jnp.sum(model(jnp.ones((TOKENS, DIM)))))(Stacked())
