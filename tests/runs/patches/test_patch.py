"""Patches replace the rows that they name, refuse any other model, and are reverted bit for bit."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from memjax.errors import CheckpointError
from memjax.runs.patches.merge import merge
from memjax.runs.patches.patch import Patch, RowChange, patch_file, read_patch, write_patch
from memjax.runs.patches.tables import between, overlay

RNG = np.random.default_rng(0)
TABLES = {
    "shared": RNG.normal(size=(16, 4)).astype(np.float32),
    "wide": RNG.normal(size=(9, 6)).astype(ml_dtypes.bfloat16),
}


def tables() -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in TABLES.items()}


def patch_of(rows, *, table: str = "shared", base: str = "base", seed: int = 1) -> Patch:
    rows, old = np.asarray(rows), TABLES[table]
    new = (old[rows] + np.random.default_rng(seed).normal(size=(len(rows), old.shape[1]))).astype(old.dtype)
    return Patch(base, {table: RowChange(len(old), rows, old[rows], new)}, {"made_by": "test"})


def test_what_is_written_is_read_again(tmp_path):
    patches = {table: patch_of([0, 3, 8], table=table) for table in TABLES}
    for table, patch in patches.items():
        file = write_patch(tmp_path / table, patch)
        assert file == tmp_path / table / "patch.safetensors" == patch_file(tmp_path / table)
        found = read_patch(tmp_path / table)
        assert (found.base, found.notes, found.identity) == (patch.base, patch.notes, patch.identity)
        change = found.tables[table]
        assert change.new.dtype == TABLES[table].dtype
        assert change.new.tobytes() == patch.tables[table].new.tobytes()
    assert write_patch(tmp_path / "one.safetensors", patches["wide"]) == tmp_path / "one.safetensors"


def test_only_the_named_rows_are_replaced():
    patch = patch_of([2, 5])
    found = overlay(tables(), [("p", patch)], base="base")
    expected = TABLES["shared"].copy()
    expected[[2, 5]] = patch.tables["shared"].new
    np.testing.assert_array_equal(found["shared"], expected)
    assert np.asarray(found["wide"]).tobytes() == TABLES["wide"].tobytes()


def test_the_difference_of_tables_is_the_patch_between_them():
    new = tables()
    new["shared"] = new["shared"].at[7].set(-0.0).at[1].add(1.0)
    new["wide"] = new["wide"].at[8, 5].add(1.0)
    patch = between(tables(), new, base="base", notes={})
    assert {name: change.rows.tolist() for name, change in patch.tables.items()} == {"shared": [1, 7], "wide": [8]}
    found = overlay(tables(), [("p", patch)], base="base")
    assert all(np.asarray(found[name]).tobytes() == np.asarray(new[name]).tobytes() for name in new)
    assert between(tables(), tables(), base="base", notes={}).tables == {}


def test_rows_that_are_not_finite_are_refused():
    new = tables() | {"shared": tables()["shared"].at[3, 2].set(jnp.nan)}
    with pytest.raises(CheckpointError, match="not finite"):
        between(tables(), new, base="base", notes={})


def test_another_model_is_refused_by_both_digests():
    with pytest.raises(CheckpointError, match=r"p: was made for another model.*other.*this one has base"):
        overlay(tables(), [("p", patch_of([1], base="other"))], base="base")


def test_rows_that_are_not_the_old_ones_are_named():
    changed = tables() | {"shared": tables()["shared"].at[5].add(1.0)}
    with pytest.raises(CheckpointError, match=r"1 rows of table shared \(5\) are not what the patch was made for"):
        overlay(changed, [("p", patch_of([2, 5]))], base="base")
    with pytest.raises(CheckpointError, match=r"q: p has changed 1 rows of table shared \(5\) too; merge the two"):
        overlay(tables(), [("p", patch_of([2, 5])), ("q", patch_of([5, 6], seed=2))], base="base")


def test_patches_of_rows_apart_commute_and_merge():
    left, right = patch_of([0, 9]), patch_of([3, 8], seed=2)
    both = [
        overlay(tables(), order, base="base") for order in ([("l", left), ("r", right)], [("r", right), ("l", left)])
    ]
    merged = overlay(tables(), [("m", merge([("l", left), ("r", right)]))], base="base")
    for name in TABLES:
        assert len({np.asarray(found[name]).tobytes() for found in (*both, merged)}) == 1


@pytest.mark.parametrize("rule", ["sum", "first", "last"])
def test_rows_in_conflict_follow_the_rule(rule):
    left, right = patch_of([2, 5]), patch_of([5, 6], seed=2)
    change = merge([("l", left), ("r", right)], conflicts=rule).tables["shared"]
    assert change.rows.tolist() == [2, 5, 6]
    old, one, other = TABLES["shared"][5], left.tables["shared"].new[1], right.tables["shared"].new[0]
    expected = {"sum": one + other - old, "first": one, "last": other}[rule]
    np.testing.assert_allclose(change.new[1], expected, rtol=1e-6)
    np.testing.assert_array_equal(change.new[[0, 2]], [left.tables["shared"].new[0], right.tables["shared"].new[1]])


def test_rows_in_conflict_are_named_without_a_rule():
    patches = [("l", patch_of([2, 5])), ("r", patch_of([5, 6], seed=2)), ("w", patch_of([1], table="wide"))]
    with pytest.raises(CheckpointError, match=r"l and r both change 1 rows of table shared \(5\)"):
        merge(patches)
    with pytest.raises(CheckpointError, match="different models: base and other"):
        merge([patches[0], ("o", patch_of([7], base="other"))])


def test_one_patch_is_not_merged_with_itself():
    with pytest.raises(CheckpointError, match="p and p are one and the same patch"):
        merge([("p", patch_of([1])), ("p", patch_of([1]))], conflicts="sum")


def test_a_sum_that_overflows_is_refused_and_not_written():
    old, huge, more = (np.full((1, 4), value, np.float32) for value in (0, 3e38, 2e38))
    patches = [
        (str(n), Patch("base", {"shared": RowChange(8, np.array([5]), old, new)})) for n, new in enumerate((huge, more))
    ]
    with pytest.raises(CheckpointError, match=r"the sums of 1 rows of table shared \(5\) are not finite"):
        merge(patches, conflicts="sum")


def stored(patch: Patch) -> tuple[dict[str, np.ndarray], dict]:
    raw = patch.to_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return safetensors.numpy.load(raw), json.loads(header["__metadata__"]["memjax.patch"])


def lie(path: pathlib.Path, arrays: dict | None = None, **changes) -> pathlib.Path:
    known, document = stored(patch_of([2, 5]))
    metadata = {"memjax.patch": json.dumps(document | changes)}
    path.write_bytes(safetensors.numpy.save(known | (arrays or {}), metadata=metadata))
    return path


GOOD = patch_of([2, 5]).tables["shared"]
WITH_NAN = np.where(np.arange(4) == 1, np.nan, GOOD.new).astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "changes", "problem"),
    [
        ({"shared/rows": np.array([2, 99])}, {}, "must ascend within 0..15"),
        ({"shared/rows": np.array([-1, 5])}, {}, "must ascend within 0..15"),
        ({"shared/rows": np.array([5, 5])}, {}, "must ascend within 0..15"),
        ({"shared/rows": np.array([2.0, 5.0])}, {}, "must be a list of int64"),
        ({"shared/rows": np.array([2])}, {}, "one for each index"),
        ({"shared/new": GOOD.new[:, :3].copy()}, {}, "must have the same type and shape"),
        ({"shared/new": GOOD.new.astype(np.float64)}, {}, "must have the same type and shape"),
        ({"shared/old": GOOD.old.astype(np.int32), "shared/new": GOOD.old.astype(np.int32)}, {}, "not floating-point"),
        ({"shared/new": WITH_NAN}, {}, "not finite"),
        ({"shared/new": GOOD.new + 1}, {}, "the digests differ"),
        ({"more": GOOD.new}, {}, "do not name the same tables: more"),
        ({}, {"version": 2}, "its version is 2"),
        ({}, {"base": 3}, "base must be a string"),
        ({}, {"tables": []}, "tables and notes must be objects"),
        ({}, {"tables": {"shared": {}}}, "has no 'num_slots'"),
        ({}, {"tables": {"shared": 7}}, "not a patch"),
        ({}, {"tables": {"shared": {"num_slots": True}}}, "must be a positive integer"),
        ({}, {"tables": {}}, "do not name the same tables"),
    ],
)
def test_a_lying_file_is_refused_in_one_line(tmp_path, arrays, changes, problem):
    with pytest.raises(CheckpointError, match=problem) as error:
        read_patch(lie(tmp_path / "lie.safetensors", arrays, **changes))
    assert "\n" not in str(error.value)
    assert "lie.safetensors" in str(error.value)


def test_a_file_that_is_not_a_patch_is_refused_in_one_line(tmp_path):
    content = patch_of([2, 5]).to_bytes()
    files = {
        "cut": content[: len(content) // 2],
        "header": content[:20],
        "empty": b"",
        "text": b"rows" * 20,
        "other": safetensors.numpy.save({"x": np.zeros(3)}),
        "json": safetensors.numpy.save({"x": np.zeros(3)}, metadata={"memjax.patch": "{"}),
        "deep": safetensors.numpy.save({"x": np.zeros(3)}, metadata={"memjax.patch": "[" * 100_000}),
        "list": safetensors.numpy.save({"x": np.zeros(3)}, metadata={"memjax.patch": "[]"}),
    }
    for name, file in files.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(file)
        with pytest.raises(CheckpointError, match=name) as error:
            read_patch(path)
        assert len(str(error.value).splitlines()) == 1
    for path in (tmp_path / "none", tmp_path, "gs://bucket/patch"):
        with pytest.raises(CheckpointError):
            read_patch(path)


def test_a_patch_for_another_table_is_refused():
    patch = patch_of([2, 5])
    odd = dataclasses.replace(patch, tables={"other": patch.tables["shared"]})
    with pytest.raises(CheckpointError, match=r"for a table other of .* the model has None"):
        overlay(tables(), [("p", odd)], base="base")
    with pytest.raises(CheckpointError, match="for a table wide of"):
        overlay(tables(), [("p", dataclasses.replace(patch, tables={"wide": patch.tables["shared"]}))], base="base")
