"""Presets load and have their stated sizes; impossible shapes are refused; configs survive a round trip as YAML."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from memjax.config.data import DataConfig, MixtureConfig
from memjax.config.load import differences, load, to_yaml
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ExpertsConfig, ModelConfig, RopeScalingConfig
from memjax.config.run import RunConfig
from memjax.config.training import CheckpointConfig
from memjax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"

PRESETS = {
    # Totals from the paper, in millions of parameters; those of 720m and below follow from its formula.
    "134m_dense": 134.1,
    "134m_memory": 936.5,
    "134m_memory_plus_1m": 937.1,
    "134m_peer": 1036.9,
    "373m_dense": 373.9,
    "373m_memory": 1441.1,
    "373m_memory_plus_1m": 1440.5,
    "373m_peer": 1575.0,
    "720m_dense": 721.2,
    "720m_memory": 2315.6,
    "720m_memory_plus_1m": 2313.0,
    "720m_peer": 2516.7,
    "1.3b_dense": 1261.5,
    "1.3b_memory": 3377.6,
    "1.3b_memory_plus_1m": 3368.1,
    "1.3b_memory_plus_4m": 9823.2,
    "1.3b_memory_plus_16m": 35618.1,
    "1.3b_memory_plus_64m": 138747.7,
    "1.3b_peer": 3645.7,
    # Llama 3 8B has 8.03 billion parameters.
    "8b_dense": 8030.3,
    "8b_memory_plus_16m": 76523.3,
    # The paper does not count routers; without them these are 983.5, 1827.2, 2797.4 and 3545.3.
    "134m_moe": 983.6,
    "373m_moe": 1827.4,
    "720m_moe": 2797.6,
    "1.3b_moe": 3545.5,
}


def parameters(model: ModelConfig) -> int:
    """Counts the parameters of an untied model by hand."""
    key_and_value = 2 * model.dim * model.kv_heads * (model.dim // model.num_heads)
    attention, norms = 2 * model.dim**2 + key_and_value, 2 * model.dim
    total = 2 * model.vocab_size * model.dim + model.dim + model.num_layers * (attention + norms)
    for layer in range(model.num_layers):
        if model.experts is not None:
            total += model.experts.num_experts * (3 * model.dim * model.ffn_dim + model.dim)
            continue
        lookup = next((one for one in (model.memory, model.peer) if one and layer in one.layers), None)
        if lookup is None:
            total += 3 * model.dim * model.ffn_dim
            continue
        queries = (model.dim + 1) * lookup.num_heads * lookup.key_dim
        keys = lookup.num_heads * 2 * lookup.num_keys * (lookup.key_dim // 2)
        value_dim = lookup.width(model.dim)
        gate = (model.dim + 1) * value_dim + (value_dim + 1) * model.dim
        gated = isinstance(lookup, MemoryConfig) and lookup.gate == "silu"
        total += queries + keys + (gate if gated else 0)
    if model.memory is not None:
        total += model.memory.num_slots * model.memory.width(model.dim)
    if model.peer is not None:
        total += 2 * model.peer.num_slots * model.dim
    return total


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_loads(path):
    config = load(RunConfig, path)
    assert config.run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("steps", [1, 2, 6, 60, 200])
def test_every_file_trains_for_any_number_of_steps_without_other_changes(steps):
    for path in CONFIGS.glob("*.yaml"):
        config = load(
            RunConfig,
            path,
            ["--train.steps", str(steps), "--data.path", "x"]
            if path.stem != "quickstart"
            else ["--train.steps", str(steps)],
        )
        for schedule in (config.optim, config.optim.table):
            assert 0 <= schedule.warmup_of(steps) < steps


@pytest.mark.parametrize(("name", "millions"), PRESETS.items())
def test_presets_have_the_sizes_of_the_paper(name, millions):
    assert round(parameters(load(RunConfig, CONFIGS / f"{name}.yaml").model) / 1e6, 1) == millions


def test_presets_differ_from_their_dense_model_only_in_memory_experts_its_tables_rate_and_mesh():
    for name in PRESETS:
        dense = load(RunConfig, CONFIGS / f"{name.split('_')[0]}_dense.yaml")
        for line in differences(dense, load(RunConfig, CONFIGS / f"{name}.yaml")):
            assert line.startswith(
                (
                    "run.dir:",
                    "model.memory:",
                    "model.experts:",
                    "model.peer:",
                    "mesh.memory:",
                    "optim.table.lr:",
                )
            ), line


def test_presets_have_the_rates_that_the_experiment_found_best():
    runs = json.loads((CONFIGS.parent / "experiments/001_fact_capacity/results/full.json").read_text())["runs"]
    for kind in ("memory", "peer", "memory_plus"):
        best = next(run for run in runs if run["stage"] == "full" and run["family"] == kind)
        for name in (name for name in PRESETS if name.partition("_")[2].startswith(kind)):
            if kind == "memory" and "memory_plus" in name:
                continue
            optim = load(RunConfig, CONFIGS / f"{name}.yaml").optim
            assert optim.table.lr / optim.lr == pytest.approx(best["table_lr"] / best["lr"]), name
            assert optim.key_lr_factor == 0.02


def test_more_picks_than_can_be_sorted_at_once_are_refused_where_factors_are_demanded():
    preset = CONFIGS / "8b_memory_plus_16m.yaml"
    # Three layers of 128 picks for each of 2048 x 4096 tokens.
    with pytest.raises(ConfigError, match=r"mesh\.row_grad_reduce=all_gather cannot sort the 3,221,225,472 reads"):
        load(RunConfig, preset, ["--mesh.row_grad_reduce", "all_gather"])
    load(RunConfig, preset, ["--mesh.row_grad_reduce", "all_gather", "--data.batch_size", "1024"])
    load(RunConfig, preset)


def test_deterministic_runs_refuse_nondeterministic_attention():
    preset = CONFIGS / "quickstart.yaml"
    assert load(RunConfig, preset, ["--train.attention", "cudnn"]).train.attention == "cudnn"
    with pytest.raises(ConfigError, match=r"train\.attention=cudnn.*run\.deterministic=True.*omit one of them"):
        load(RunConfig, preset, ["--train.attention", "cudnn", "--run.deterministic"])


def test_how_often_tables_are_saved_is_always_or_every_so_many():
    assert CheckpointConfig(every=50).steps_between_tables == 50
    assert CheckpointConfig(every=50, tables="every 4").steps_between_tables == 200
    for wrong in ("never", "every", "every 0", "every -1", "4"):
        with pytest.raises(ValueError, match=rf"tables={wrong} must be always or, as in 'every 4', every and a number"):
            CheckpointConfig(tables=wrong)


def test_the_quick_start_is_the_defaults():
    assert load(RunConfig, CONFIGS / "quickstart.yaml") == RunConfig()


def test_layers_outside_the_model_are_refused():
    with pytest.raises(ValueError, match=r"memory\.layers=\[7\] must lie in 0\.\.2"):
        ModelConfig(num_layers=3, memory=MemoryConfig(layers=(7,)))


def test_every_block_is_of_one_kind():
    mixed = ModelConfig(
        num_layers=6,
        memory=MemoryConfig(layers=(1, 4)),
        peer=PEERConfig(layers=(2,)),
        experts=ExpertsConfig(layers=(0, 5)),
    )
    kinds = ["experts", "memory", "peer", "dense", "memory", "experts"]
    assert [mixed.kind(layer) for layer in range(6)] == kinds
    assert mixed.layers_of("experts") == (0, 5)
    assert mixed.layers_of("dense") == (3,)
    # Without a list, experts get every block that nothing else names; a parallel memory names its block, too.
    beside = ModelConfig(memory=MemoryConfig(layers=(1,), placement="parallel"), experts=ExpertsConfig())
    assert [beside.kind(layer) for layer in range(3)] == ["experts", "dense", "experts"]
    assert ModelConfig(memory=None).layers_of("dense") == (0, 1, 2)


def test_a_block_that_two_lists_name_is_refused():
    with pytest.raises(ValueError, match=r"experts\.layers=\[0, 2\] and memory\.layers both name \[2\]: a block is"):
        ModelConfig(memory=MemoryConfig(layers=(1, 2)), experts=ExpertsConfig(layers=(0, 2)))
    with pytest.raises(ValueError, match=r"peer\.layers=\[1\] and memory\.layers both name \[1\]"):
        ModelConfig(memory=MemoryConfig(placement="parallel"), peer=PEERConfig())
    with pytest.raises(ValueError, match=r"experts\.layers=\[3\] must lie in 0\.\.2"):
        ModelConfig(experts=ExpertsConfig(layers=(3,)))
    with pytest.raises(ValueError, match=r"experts\.layers=null finds no block that is not in another list"):
        ModelConfig(memory=MemoryConfig(layers=(0, 1, 2)), experts=ExpertsConfig())


def test_impossible_experts_are_refused():
    for fields, problem in [
        ({"top_k": 9}, r"top_k=9 must be in 1\.\.num_experts=8"),
        ({"top_k": 1, "renormalize": True}, "renormalize=True needs .* top_k above 1, not token_choice and 1:"),
        ({"routing": "expert_choice", "renormalize": True}, "needs routing=token_choice and .*, not expert_choice"),
        (
            {"routing": "expert_choice", "capacity_factor": 9.0},
            r"capacity_factor=9\.0 must be above 0 and at most num_experts=8",
        ),
        ({"layers": ()}, r"layers=\[\] must name at least one block; for none, set the section to null"),
        ({"aux_loss_weight": -1.0, "ffn_dim": 0}, r"ffn_dim=0 must be positive\naux_loss_weight=-1\.0 must not be neg"),
    ]:
        with pytest.raises(ValueError, match=problem):
            ExpertsConfig(**fields)
    assert (ExpertsConfig().chosen, ExpertsConfig(routing="expert_choice", top_k=99).chosen) == (2, 1)


def test_impossible_rope_scalings_and_windows_are_refused():
    with pytest.raises(ValueError, match=r"high_freq_factor=1\.0 must be above low_freq_factor=1\.0"):
        RopeScalingConfig(high_freq_factor=1.0)
    with pytest.raises(ValueError, match=r"factor=0\.0 must be positive\noriginal_length=-1 must be positive"):
        RopeScalingConfig(factor=0.0, original_length=-1)
    with pytest.raises(ValueError, match="sliding_window=0 must be positive"):
        ModelConfig(sliding_window=0)


def test_impossible_heads_are_refused():
    with pytest.raises(
        ValueError, match="num_heads=3 must divide dim=64 into heads of an even width, or head_dim be set"
    ):
        ModelConfig(num_heads=3)
    assert ModelConfig(num_heads=3, head_dim=8).head_width == 8
    assert ModelConfig(num_heads=4).head_width == 16
    with pytest.raises(ValueError, match="head_dim=7 must be even: rotary positions turn pairs"):
        ModelConfig(head_dim=7)
    with pytest.raises(ValueError, match="head_dim=0 must be positive"):
        ModelConfig(head_dim=0)


def test_derived_sizes():
    memory = MemoryConfig(layers=(0, 2), num_keys=100, num_heads=4, top_k=32)
    assert (memory.num_slots, memory.picks) == (10_000, 128)
    experts = PEERConfig(layers=(1, 3), num_keys=20)
    readers = lambda model: {name: table.readers for name, table in model.tables.items()}
    model = ModelConfig(num_layers=4, memory=memory, peer=experts)
    assert readers(model) == {"shared": (0, 2), "experts_inputs": (1, 3), "experts_outputs": (1, 3)}
    assert {name: (table.num_slots, table.width) for name, table in model.tables.items()} == {
        "shared": (10_000, 64),
        "experts_inputs": (400, 64),
        "experts_outputs": (400, 64),
    }
    apart = {"memory": dataclasses.replace(memory, shared_table=False), "peer": None}
    assert readers(dataclasses.replace(model, **apart)) == {"layer_0": (0,), "layer_2": (2,)}
    own = dataclasses.replace(experts, layers=(1,), shared_table=False)
    assert list(dataclasses.replace(model, peer=own).tables) == [
        "shared",
        "experts_1_inputs",
        "experts_1_outputs",
    ]
    assert list(model.lookups) == [0, 2, 1, 3]


REQUIRED: dict[type, dict] = {MixtureConfig: {"name": "a", "path": "b"}}
"""Fields without a default."""


def some_fields(section: type) -> st.SearchStrategy[dict]:
    """Draws fields of a section with values of the right type, valid or not; nested sections are dictionaries."""
    hints = typing.get_type_hints(section)
    return st.fixed_dictionaries({}, optional={f.name: value_of(hints[f.name]) for f in dataclasses.fields(section)})


def value_of(annotation) -> st.SearchStrategy:
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        return st.none() | value_of(next(kind for kind in arguments if kind is not type(None)))
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(arguments)
    if annotation == tuple[str, ...]:
        return st.lists(st.text() | st.sampled_from(["a, b", "null", "- a"]), unique=True).map(tuple)
    if annotation == tuple[float, ...]:
        return st.lists(st.floats(0, 2), max_size=3).map(tuple)
    if typing.get_origin(annotation) is tuple and dataclasses.is_dataclass(arguments[0]):
        item = typing.cast(type, arguments[0])
        return st.lists(some_fields(item), max_size=3)
    if typing.get_origin(annotation) is tuple:
        return st.lists(st.integers(0, 2), unique=True, min_size=1).map(sorted).map(tuple)
    if dataclasses.is_dataclass(annotation):
        return some_fields(typing.cast(type, annotation))
    if arguments == (int, float):
        return st.integers(0, 2**31) | st.floats(0, 1, exclude_max=True)
    return {
        int: st.integers(0, 2**31) | st.sampled_from([1, 2, 64]),
        float: st.floats(0, 1) | st.floats(1e-30, 1e30),
        bool: st.booleans(),
        str: st.text() | st.sampled_from(["null", "1e3", "no", "0x10", "- a", "a: b", " a ", "12", "true", "#", "1_0"]),
    }[annotation]


def build(section: type, fields: dict) -> Any:
    """Builds a config from the fields that are valid, with defaults for the others."""
    hints, kept = typing.get_type_hints(section), dict(REQUIRED.get(section, {}))
    for name, value in fields.items():
        if isinstance(value, dict):
            kinds = (hints[name], *typing.get_args(hints[name]))
            value = build(
                next(kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), value
            )
        if isinstance(value, list):
            item = typing.get_args(hints[name])[0]
            value = tuple(build(item, fields) for fields in value)
        try:
            section(**{**kept, name: value})
        except ValueError:
            continue
        kept[name] = value
    return section(**kept)


def test_a_mixture_survives_yaml(tmp_path):
    parts = (MixtureConfig(name="a", path="x: y"), MixtureConfig(name="b", path="null", weight=0.25, source="text"))
    config = RunConfig(data=DataConfig(source="mixture", mixture=parts))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(RunConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "mixture"}, "source=mixture needs the parts to mix; list them in mixture"),
        ({"mixture": (MixtureConfig(name="a", path="x"),)}, "source=biographies does not read mixture"),
        (
            {"source": "mixture", "path": "x", "mixture": (MixtureConfig(name="a", path="x"),)},
            "path=x is not read with source=mixture; make it a component of the mixture",
        ),
        (
            {"source": "mixture", "mixture": (MixtureConfig(name="a", path="x"), MixtureConfig(name="a", path="y"))},
            r"mixture=\['a', 'a'\] must give every component its own name",
        ),
    ],
)
def test_a_mixture_with_too_few_or_too_many_settings_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(("field", "value"), [("name", "../x"), ("name", ""), ("weight", 0.0)])
def test_a_part_of_a_mixture_needs_a_plain_name_and_a_weight(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must"):
        MixtureConfig(**{"name": "a", "path": "x", field: value})


@given(fields=some_fields(RunConfig))
def test_yaml_gives_back_an_equal_config(tmp_path_factory, fields):
    config = build(RunConfig, fields)
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load(RunConfig, path) == config
