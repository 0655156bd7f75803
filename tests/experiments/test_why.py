"""The tables of 001's stage `why` show differences of means over its runs."""

import importlib.util
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[2] / "experiments" / "001_fact_capacity" / "why.py"


@pytest.fixture(scope="module")
def why():
    spec = importlib.util.spec_from_file_location("why", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(variant, recall):
    found = {"settings": ["--data.batch_size", "64", *variant.all_settings], "table_lr": variant.design.table_lr}
    return found | {"without": variant.without, "recall": recall, "exposures": 40.0}


def test_every_variant_is_recognised_in_its_result(why):
    variants = list(why.variants())
    assert len(set(variants)) == 20
    assert [why.Variant.of(row(variant, 0.0)) for variant in variants] == variants


def test_a_step_that_costs_the_same_everywhere_is_shown_with_that_cost(why):
    def recall(variant):
        gated, low = variant.design.gate == "silu", variant.design.table_lr <= 0.1
        both = variant.design.layers == "1,3" and gated
        return 0.9 - 0.1 * gated - 0.02 * low - 0.05 * both + (0.03 if variant.settings else 0)

    rows = [row(variant, recall(variant) + shift) for variant in why.variants() for shift in (-0.01, 0.01)]
    designs, steps, changes = why.tables(rows)[1::2]
    assert "| gate and projection | -10.0 | -15.0 | -12.5 | -15.0, -15.0, -10.0, -10.0 |" in steps
    assert "| table rate 0.1 | -2.0 | -2.0 | -2.0 |" in steps
    assert "| two layers share the table | +0.0 | -5.0 | -2.5 |" in steps
    assert "| all three | -17.0 |" in steps
    assert "| 1,3 | silu | 73.0% (72.0% to 74.0%) | 73.0% (72.0% to 74.0%) | 75.0% (74.0% to 76.0%) |  |" in designs
    assert "| blocks 2, gate none, 0.3 | `memory.value_init_scale` 1.0 | 93.0% (92.0% to 94.0%) | +3.0 |" in changes
    assert "no gate_proj" in changes


def test_without_both_ends_nothing_is_shown(why):
    assert why.tables([row(next(iter(why.variants())), 0.5)]) == []
