"""Layers refuse inputs that do not fit, accept zero tokens, and enforce the config's rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.memory import sharded
from memjax.memory.layer import MemoryLayer
from memjax.memory.peer import PEERLayer
from memjax.memory.table import ValueTable
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, row_step

DIM = 6
SIZES: dict[str, Any] = {"num_keys": 3, "num_heads": 2, "top_k": 2, "key_dim": 4}


def build():
    rngs = nnx.Rngs(0)
    tables = [ValueTable(9, DIM, rngs=rngs) for _ in range(3)]
    return MemoryLayer(DIM, **SIZES, rngs=rngs), PEERLayer(DIM, **SIZES, rngs=rngs), tables


@pytest.mark.parametrize("shape", [(8, 3), (8, 12), (6, 8), (4, 2, 2)], ids=str)
def test_activations_of_another_width_are_refused(as_users_call, shape):
    memory, experts, (table, inputs, outputs) = build()
    x = jnp.ones(shape)
    message = rf"x must be \[\.\.\., 6\]; found x float32\[{', '.join(map(str, shape))}\]"
    bag = jnp.ones((8, DIM))
    for call in (
        lambda: memory(x, table),
        lambda: memory.lookup(x),
        lambda: memory.combine(x, bag),
        lambda: experts(x, inputs, outputs),
        lambda: experts.lookup(x),
        lambda: jax.jit(lambda x: memory(x, table))(x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", [jnp.int32, bool])
def test_activations_that_are_not_floats_are_refused(as_users_call, kind):
    memory, experts, (table, inputs, outputs) = build()
    x = jnp.ones((8, DIM), kind)
    for call in (lambda: memory(x, table), lambda: experts(x, inputs, outputs)):
        with pytest.raises(ValueError, match=rf"x must be floating-point numbers; found x {x.dtype}"):
            call()


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_arrays_for_another_number_of_tokens_are_refused(as_users_call, tokens):
    memory, experts, (table, inputs, outputs) = build()
    x = jnp.ones((8, DIM))
    lookup = memory.lookup(x)
    with pytest.raises(ValueError, match=rf"perturbation float32\[{tokens}, 6\], indices int32\[8, 4\]"):
        memory.read(table, lookup, jnp.zeros((tokens, DIM)))
    with pytest.raises(ValueError, match=rf"perturbation float32\[{tokens}, 4\], indices int32\[8, 4\]"):
        experts.with_reads(x, inputs, outputs, perturbations=experts.zero_perturbations(tokens, inputs, outputs))
    with pytest.raises(ValueError, match=rf"x float32\[8, 6\], bag float32\[{tokens}, 6\]"):
        memory.combine(x, jnp.ones((tokens, DIM)))


@pytest.mark.parametrize("shape", [(0, DIM), (4, 0, DIM)], ids=str)
def test_zero_tokens_give_nothing(shape):
    memory, experts, (table, inputs, outputs) = build()
    x = jnp.ones(shape)
    assert memory(x, table).shape == experts(x, inputs, outputs).shape == shape
    gradient = nnx.grad(lambda table: jnp.sum(memory(x, table)))(table)
    assert not np.any(gradient["rows"][...])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gate": "SiLU"}, "gate='SiLU' is unknown; known: none, silu"),
        ({"gate": True}, "gate=True is unknown"),
        ({"gate": None}, "gate=None is unknown"),
        ({"num_keys": 32769}, "num_keys=32769 must be at most 32768: slot numbers are 32-bit"),
        ({"num_keys": 3.0}, "num_keys=3.0 must be a whole number"),
        ({"value_dim": 0}, "value_dim=0 must be positive"),
        ({"num_heads": 0}, "num_heads=0 must be positive"),
        ({"dtype": "int32"}, "dtype=int32 must be a type of floating-point numbers"),
        ({"param_dtype": bool}, "param_dtype=bool must be a type of floating-point numbers"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown; known: triton, xla, reference"),
        ({"score_scale": float("nan")}, "score_scale=nan must be a finite number"),
    ],
)
def test_rules_of_the_config_hold_for_the_layers(as_users_call, wrong, message):
    kinds = [MemoryLayer] if wrong.keys() & {"gate", "value_dim"} else [MemoryLayer, PEERLayer]
    for kind in kinds:
        with pytest.raises(ValueError, match=message):
            kind(DIM, **{**SIZES, **wrong}, rngs=nnx.Rngs(0))


def test_rules_of_the_config_hold_for_tables_and_collectives(as_users_call):
    sizes: dict[str, Any] = {"num_slots": 4, "value_dim": 4}
    wrongs: list[dict[str, Any]] = [{"num_slots": 0}, {"num_slots": 2**31}, {"value_dim": -1}, {"dtype": jnp.int8}]
    wrongs += [{"dtype": "float8_e4m3fn"}, {"init_scale": float("nan")}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}="):
            ValueTable(**{**sizes, **wrong}, rngs=nnx.Rngs(0))
    gradient = RowGradient(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), jnp.ones((1, 4)))
    unknown: Any = "Dense"
    with pytest.raises(ValueError, match="collective='Dense' is unknown; known: auto, all_gather, all_reduce"):
        sharded.update_rows(jnp.ones((4, 4)), {}, [gradient], RowRule(kind="sgd"), row_step(1.0, 0), collective=unknown)


def test_tokens_that_devices_cannot_share_evenly_are_refused_with_what_to_do(mesh):
    memory, experts, (table, inputs, outputs) = build()
    x = jnp.ones((15, DIM))
    with jax.set_mesh(mesh):
        for call in (lambda: memory(x, table), lambda: experts(x, inputs, outputs)):
            with pytest.raises(ValueError, match=r"15 tokens .* 8 devices \(data=2 x memory=4\): fill up to 16 with"):
                call()


def test_zero_tokens_on_a_mesh_give_nothing_and_leave_tables_unchanged(mesh):
    memory, experts, (table, inputs, outputs) = build()
    rows = jnp.ones((4, 8))
    with jax.set_mesh(mesh):
        assert experts(jnp.ones((0, DIM)), inputs, outputs).shape == (0, DIM)
        assert memory(jnp.ones((2, 0, DIM)), table).shape == (2, 0, DIM)
        nothing = RowGradient(jnp.zeros((0, 1), jnp.int32), jnp.ones((0, 1)), jnp.ones((0, 8)))
        new, _ = sharded.update_rows(rows, {}, [nothing], RowRule(kind="sgd"), row_step(1.0, 0))
    np.testing.assert_array_equal(new, rows)


@pytest.mark.parametrize(
    ("kind", "section", "more"),
    [(MemoryLayer, MemoryConfig, {"gate": "none", "value_dim": 4}), (PEERLayer, PEERConfig, {})],
)
def test_a_section_and_keywords_make_the_same_layer(as_users_call, kind, section, more):
    def graph(*arguments, **options):
        return nnx.graphdef(nnx.eval_shape(lambda: kind(DIM, *arguments, **options, rngs=nnx.Rngs(0))))

    assert graph() == graph(section())
    expected = graph(section(**SIZES, **more))
    assert graph(**SIZES, **more) == graph(section(**SIZES), **more) == expected
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no setting num_key; known: layers, .*num_keys"):
        kind(DIM, section(), num_key=3, rngs=nnx.Rngs(0))
    wrong: Any = SIZES
    with pytest.raises(TypeError, match=rf"{kind.__name__}: config=.* must be an object with settings"):
        kind(DIM, wrong, rngs=nnx.Rngs(0))


def test_anything_but_a_table_is_refused(as_users_call):
    memory, experts, (table, *_) = build()
    rows: Any = table.rows[...]
    nothing: Any = None
    for call in (lambda x: memory(x, rows), lambda x: memory(x, x), lambda x: experts(x, table, nothing)):
        with pytest.raises(TypeError, match=r"Layer: layer\(x, \*tables\) needs tables of type ValueTable, found"):
            call(jnp.ones((8, DIM)))


def test_another_number_of_tables_is_refused():
    memory, experts, (table, *_) = build()
    for layer, tables, count in ((memory, (), 1), (experts, (table,), 2)):
        rule = rf"{type(layer).__name__}: .* needs {count} ValueTable\(s\), found {len(tables)}"
        with pytest.raises(ValueError, match=rule):
            layer(jnp.ones((8, DIM)), *tables)
    with pytest.raises(ValueError, match="MemoryLayer takes 1 perturbations, found 2"):
        memory.with_reads(jnp.ones((8, DIM)), table, perturbations=(jnp.zeros((8, DIM)),) * 2)
