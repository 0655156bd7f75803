"""Patches are applied to a run and reverted without touching its checkpoints."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import patch as command
from memjax.checkpoint import Checkpoints
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import CheckpointError, ConfigError
from memjax.io.files import write_atomic
from memjax.models.parts import DecoderParts, split_decoder
from memjax.ops import host_memory
from memjax.runs.layout import meta_document, params_to_tree
from memjax.runs.load import load
from memjax.runs.patches import applied, edit
from memjax.runs.patches.patch import Patch, read_patch, write_patch
from memjax.runs.settings import CheckpointSettings, InferenceSettings, loaded

CONFIG = RunConfig(
    model=ModelConfig(
        dim=8,
        num_layers=1,
        num_heads=2,
        ffn_dim=8,
        vocab_size=259,
        memory=MemoryConfig(layers=(0,), num_keys=4, num_heads=1, top_k=2, key_dim=4),
    )
)


@functools.cache
def arrays():
    parts, rng = DecoderParts.of(CONFIG.model), np.random.default_rng(0)
    fill = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype))
    return fill(parts.abstract_params), fill(parts.abstract_tables)


def save(folder: pathlib.Path, change: dict[int, float] | None = None, *, dense: float = 0) -> str:
    """Saves a run, with numbers added to some rows of its table and to its dense parameters."""
    params, tables = arrays()
    rows = tables["shared"]
    for row, added in (change or {}).items():
        rows = rows.at[row].add(added)
    params = jax.tree.map(lambda leaf: leaf + dense, params)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        items = {"params": params_to_tree(params), "tables": {"shared": rows}}
        checkpoints.save(3, items, {"meta": meta_document(CONFIG, ByteTokenizer(), step=3)})
    return str(folder)


def table_of(run, *patches) -> np.ndarray:
    return np.asarray(split_decoder(load(run, patches=patches).model)[2]["shared"])


def files_of(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, patches of two rows each that share at most one, and the resulting tables."""
    folder = tmp_path_factory.mktemp("runs")
    base, changes = save(folder / "base"), {"a": {1: 1.0, 4: 2.0}, "b": {7: 1.0, 9: -1.0}, "c": {4: -3.0, 5: 1.0}}
    patches = {}
    for name, change in changes.items():
        other = save(folder / name, change)
        patches[name] = str(write_patch(folder / f"{name}.safetensors", edit.diff(base, other)))
    return base, patches, {name: table_of(folder / name) for name in changes}


def test_load_lays_patches_over_the_model_and_writes_nothing(runs):
    base, patches, tables = runs
    before = files_of(base)
    for name, path in patches.items():
        np.testing.assert_array_equal(table_of(base, path), tables[name])
    both = table_of(base, patches["a"], patches["b"])
    np.testing.assert_array_equal(both, tables["a"] + tables["b"] - table_of(base))
    assert files_of(base) == before
    with pytest.raises(CheckpointError, match=r"a.safetensors has changed 1 rows of table shared \(4\) too"):
        table_of(base, patches["a"], patches["c"])
    with pytest.raises(CheckpointError, match="is already applied"):
        table_of(base, patches["b"], patches["b"])


def test_an_applied_patch_is_part_of_the_model_until_it_is_reverted(runs, capsys):
    base, patches, tables = runs
    before, original = files_of(base), table_of(base)
    assert command.main(["apply", base, patches["a"]]) == 0
    identity = capsys.readouterr().out.split()[-1]
    np.testing.assert_array_equal(table_of(base), tables["a"])
    with pytest.raises(CheckpointError, match=f"is already applied, as patch {identity}"):
        edit.apply(base, patches["a"])
    with pytest.raises(CheckpointError, match="has changed 1 rows"):
        edit.apply(base, patches["c"])
    edit.apply(base, patches["b"])
    assert command.main(["revert", base, identity]) == 0
    np.testing.assert_array_equal(table_of(base), tables["b"])
    edit.revert(base, patches["b"])
    assert table_of(base).tobytes() == original.tobytes()
    assert {name: content for name, content in files_of(base).items() if name in before} == before
    with pytest.raises(CheckpointError, match=f"patch {identity} is not applied to step 3; none is applied"):
        edit.revert(base, patches["a"])
    with pytest.raises(CheckpointError, match=f"patch {identity} is not applied to step 3; none is applied"):
        edit.revert(base, identity)


def test_a_patch_below_a_later_one_cannot_be_reverted(runs, tmp_path):
    base, patches, _ = runs
    edit.apply(base, patches["a"])
    try:
        other = save(tmp_path / "over", {1: 5.0, 4: 2.0})
        over = write_patch(tmp_path / "over.safetensors", edit.diff(base, other))
        edit.apply(base, over)
        with pytest.raises(CheckpointError, match=r"was applied after .* changes 1 of the same rows; revert it first"):
            edit.revert(base, patches["a"])
        edit.revert(base, over)
    finally:
        edit.revert(base, patches["a"])


def test_a_separate_run_has_the_rows_in_its_checkpoint(runs, tmp_path):
    base, patches, tables = runs
    before = files_of(base)
    assert command.main(["apply", base, patches["a"], "--out", str(tmp_path / "new")]) == 0
    np.testing.assert_array_equal(table_of(tmp_path / "new"), tables["a"])
    assert files_of(base) == before


def test_another_base_is_refused_in_one_line(runs, tmp_path, capsys):
    _, patches, _ = runs
    other = save(tmp_path / "other", {0: 1.0})
    assert command.main(["apply", other, patches["a"]]) == 4
    error = capsys.readouterr().err
    assert "was made for another model: for the digest" in error
    assert len(error.splitlines()) == 1
    assert not (pathlib.Path(other) / "patches" / "applied.json").exists()


def test_runs_that_differ_in_more_than_rows_give_no_patch(runs, tmp_path):
    base, *_ = runs
    with pytest.raises(CheckpointError, match="a patch holds rows of tables only"):
        edit.diff(base, save(tmp_path / "dense", dense=1))


def test_patches_are_merged_and_shown(runs, tmp_path, capsys):
    base, patches, tables = runs
    out = str(tmp_path / "both")
    assert command.main(["merge", patches["a"], patches["b"], "--out", out]) == 0
    np.testing.assert_array_equal(table_of(base, out), tables["a"] + tables["b"] - table_of(base))
    assert command.main(["merge", patches["a"], patches["c"], "--out", out]) == 4
    assert "both change 1 rows of table shared (4)" in capsys.readouterr().err
    assert command.main(["merge", patches["a"], patches["c"], "--out", out, "--conflicts", "last"]) == 0
    assert read_patch(out).num_rows == 3
    assert command.main(["show", out, "--top", "2"]) == 0
    printed = capsys.readouterr().out
    assert "rows 3 of 16 in shared" in printed
    assert "and 1 more" in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_what_learn_has_measured_is_shown_as_learn_prints_it(tmp_path, capsys):
    notes = {"facts": 2, "new facts before": 0.0, "new facts after": 1.0, "bits per byte, background after": 4.80102}
    write_patch(tmp_path, Patch("ab" * 32, {}, notes))
    assert command.main(["show", str(tmp_path)]) == 0
    values = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert values == ["2", "0.0%", "100.0%", "4.801"]


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["apply", "RUN"], 2, "takes 2 arguments"),
        (["apply", "RUN", "a", "b"], 2, "takes 2 arguments"),
        (["diff", "RUN"], 2, "out"),
        (["squash"], 2, "there is no command 'squash'"),
        (["show", "nowhere"], 4, "there is no such file"),
    ],
)
def test_wrong_command_lines_are_refused(words, code, problem, capsys):
    try:
        found = command.main(words)
    except SystemExit as end:
        found = end.code
    assert found == code
    assert problem in capsys.readouterr().err


def test_a_list_that_is_damaged_is_named(runs, tmp_path):
    other = save(tmp_path / "run")
    listed = tmp_path / "run" / "patches" / "applied.json"
    listed.parent.mkdir()
    for content in ("{", "[]", '{"3": ["../x"]}', '{"3": 3}'):
        listed.write_text(content)
        with pytest.raises(CheckpointError, match=r"applied\.json: cannot be read \([^()]{1,99}\); correct it, or"):
            load(other)
    listed.unlink()
    listed.mkdir()
    with pytest.raises(CheckpointError, match=r"applied\.json: cannot be read \(.*Is a directory"):
        load(other)


def test_a_lost_copy_of_an_applied_patch_is_named_with_the_ways_out(runs, tmp_path):
    other = save(tmp_path / "run")
    listed = tmp_path / "run" / "patches" / "applied.json"
    listed.parent.mkdir()
    listed.write_text('{"3": ["0123456789abcdef"]}')
    for use in (load, lambda run: edit.revert(run, "0123456789abcdef"), lambda run: edit.apply(run, runs[1]["a"])):
        with pytest.raises(CheckpointError, match=r"no such file.*\n.*or remove 0123456789abcdef from .*applied\.json"):
            use(other)


class Died(BaseException):
    """Stands for a kill: nothing is written afterwards."""


@pytest.fixture
def dies_at(monkeypatch):
    """dies_at(moment): dies at the write after `moment` writes of the list of patches and copies of their files."""

    def limit(moment: int) -> None:
        left = iter(range(moment))

        def write(path, content):
            if next(left, None) is None:
                raise Died
            return write_atomic(path, content)

        monkeypatch.setattr(applied, "write_atomic", write)

    return limit


@pytest.mark.parametrize("moment", [0, 1])
def test_a_model_is_the_one_before_or_after_wherever_a_process_dies(runs, moment, dies_at):
    base, patches, tables = runs
    original = table_of(base)
    dies_at(moment)
    with pytest.raises(Died):
        edit.apply(base, patches["a"])
    np.testing.assert_array_equal(table_of(base), original)
    dies_at(2)
    edit.apply(base, patches["a"])
    dies_at(0)
    with pytest.raises(Died):
        edit.revert(base, patches["a"])
    np.testing.assert_array_equal(table_of(base), tables["a"])
    dies_at(1)
    edit.revert(base, patches["a"])
    np.testing.assert_array_equal(table_of(base), original)


def test_patches_of_a_run_are_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "patches").symlink_to(tmp_path / "other")
    patches = applied.Applied(tmp_path / "run" / "checkpoints")
    with pytest.raises(OSError, match=r"leads out of its folder, .*; move that folder here"), patches.owned():
        pass
    assert list((tmp_path / "other").iterdir()) == []


def test_without_room_for_the_tables_only_options_of_the_caller_are_advised(tmp_path, monkeypatch):
    run = save(tmp_path / "run")
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1)

    def open_with(settings):
        with loaded(run, settings):
            pass

    for call in (
        lambda: edit.diff(run, run),
        lambda: load(run, patches=["any.safetensors"]),
        lambda: open_with(CheckpointSettings()),
        lambda: open_with(InferenceSettings(patch=("any.safetensors",))),
    ):
        with pytest.raises(ConfigError, match=r"that this machine has left; use a machine with more$"):
            call()
    with pytest.raises(ConfigError, match="has left; load with table_place=host"):
        open_with(InferenceSettings())
    applied.Applied(tmp_path / "run" / "checkpoints")._write(3, ["0123456789abcdef"])
    with pytest.raises(ConfigError, match=r"has left; use a machine with more$"):
        open_with(InferenceSettings())
