"""A run that starts from another's weights, strictly and once, without the other's training state."""

import dataclasses
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax
from memjax import train
from memjax.checkpoint.checkpoints import Checkpoints
from memjax.config.load import load
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import CheckpointError, ConfigError
from memjax.interop.upcycle import upcycle_run
from memjax.models.parts import DecoderParts, split_decoder
from memjax.ops.row_formats import formats
from memjax.runs.folder import Claim, RunFolder
from memjax.runs.layout import OPT_STATE, params_to_tree
from memjax.runs.quantize import quantize_run
from memjax.runs.write import write_run
from memjax.sharding.mesh import make_mesh
from memjax.training import main
from memjax.training.start import check_start, log_schedule_changes

DENSE = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=24, vocab_size=259, memory=None)
MEMORY = MemoryConfig(layers=(0,), placement="parallel", num_keys=8, num_heads=2, top_k=3, key_dim=8)
SETTINGS = """
--data.source text --data.validation_fraction 0 --data.sequence_length 16 --data.batch_size 8 --data.packing concat
--optim.warmup_steps 0 --optim.table.warmup_steps 0 --optim.freeze_dense true --optim.schedule constant
--train.steps 2 --checkpoint.every 1 --eval.every null --log.tensorboard false
"""

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense run, the same model with a memory, and a corpus."""
    folder = tmp_path_factory.mktemp("runs")
    parts, rng = DecoderParts.of(DENSE), np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4 + (leaf.ndim == 1), leaf.dtype)
    model = parts.merge(jax.tree.map(draw, parts.abstract_params), {})
    write_run(folder / "dense", model, ByteTokenizer(), RunConfig(model=DENSE))
    upcycle_run(folder / "dense", folder / "memory", MEMORY)
    (folder / "corpus.txt").write_text("\n".join(f"line {number} of a small corpus" for number in range(50)))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run(config's folder, name, *settings): returns (exit code, output)."""

    def run(config: str, name: str, *settings: str) -> tuple[int, str]:
        monkeypatch.setattr(main, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        paths = ["--data.path", str(folder / "corpus.txt"), "--run.dir", str(folder / name)]
        code = train.main([str(folder / config / "config.yaml"), *SETTINGS.split(), *paths, *settings])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def arrays_of(folder, step: Any = "latest") -> dict[str, np.ndarray]:
    _, params, tables = split_decoder(memjax.load(folder, step=step).model)
    leaves = jax.tree_util.tree_flatten_with_path({"params": params_to_tree(params), "tables": tables})[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
def test_a_training_starts_from_the_weights_and_does_not_do_so_again_when_it_resumes(folder, run):
    start = str(folder / "memory")
    code, printed = run("memory", "new", "--train.init_from", start, "--train.steps", "1")
    assert code == 0, printed
    assert f"starts from step 0 of {start}" in printed
    assert (folder / "new/tokenizer.json").exists()
    before, after = arrays_of(folder / "memory"), arrays_of(folder / "new")
    moved = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    assert "params/blocks/0/memory/scale" in moved
    assert all("/memory/" in name or name.startswith("tables/") for name in moved), "the dense part is frozen"

    # The source of the weights is gone, but the run resumes from its own checkpoint.
    (folder / "new/summary.json").unlink()
    (folder / "memory").rename(folder / "elsewhere")
    code, printed = run("elsewhere", "new", "--train.init_from", start, "--allow_changed")
    assert code == 0, printed
    (folder / "elsewhere").rename(folder / "memory")
    assert "resumed from step 1" in printed
    assert "starts from" not in printed
    later, scale = arrays_of(folder / "new"), "params/blocks/0/memory/scale"
    # An Adam step is at most about the rate, so a run that started again could not have come this far in one step.
    assert np.abs(later[scale]).max() > 1.5 * np.abs(after[scale]).max()
    assert not np.array_equal(later["tables/shared"], before["tables/shared"]), "the table learns once the scale moved"
    code, printed = run("memory", "new", "--train.init_from", str(folder / "dense"))
    assert code == 2
    assert "train.init_from" in printed


def test_what_does_not_fit_is_refused_before_anything_is_written(folder, run, capsys):
    start = str(folder / "memory")

    def refused(config: str, *settings: str, code: int = 2) -> str:
        got, printed = run(config, "refused", *settings)
        assert got == code, printed
        assert not (folder / "refused").exists()
        return printed

    printed = refused("memory", "--train.init_from", start, "--model.ffn_dim", "32", "--model.memory.num_keys", "9")
    assert f"train.init_from={start} does not fit the model" in printed
    assert "params/blocks/0/feed_forward/up/kernel: has [16, 24], the model has [16, 32]" in printed
    assert "tables/shared: has [64, 16], the model has [81, 16]" in printed
    printed = refused("memory", "--train.init_from", str(folder / "dense"))
    assert "params/blocks/0/memory/scale: has nothing, the model has [16]" in printed
    assert "there is no such folder" in refused("memory", "--train.init_from", str(folder / "none"), code=4)
    with pytest.raises(SystemExit):
        run("dense", "refused")
    assert "optim.freeze_dense=True leaves nothing to train without model.memory" in capsys.readouterr().err


def test_a_folder_that_holds_a_model_alone_is_not_resumed_but_says_how_to_train_it(folder, run):
    for data in ([], ["--data.path", str(folder / "none.txt")]):  # missing data is not reported first
        code, printed = run("memory", "memory", *data)
        assert code == 2
        assert re.search(r"run\.dir=\S+/memory holds a model without the state of a training", printed)
        place = folder / "memory"
        assert f"python -m memjax.train {place} --train.init_from {place} --run.dir NEW_RUN" in printed


@pytest.mark.parametrize("row_format", ["int8", None])
def test_tables_in_files_are_not_trained_and_the_run_that_they_were_made_from_is_named_as_the_way(
    folder, run, row_format
):
    place = folder / f"in_{row_format}"
    quantize_run(folder / "memory", place, row_format and formats.find(row_format))
    way_out = f"read-only, in {row_format or 'float32'}; train the run that `convert quantize` made it from"
    code, printed = run(place.name, place.name)
    assert code == 2
    source = folder / "memory"
    command = rf"python -m memjax\.train {source} --train\.init_from {source} --run\.dir NEW_RUN"
    assert re.search(rf"run\.dir=\S+ holds a model whose tables are {way_out}: {command}", printed)
    code, printed = run("memory", "refused", "--train.init_from", str(place))
    assert code == 2
    assert re.search(rf"train\.init_from=\S+: its tables are {way_out}, {source}", printed)
    assert not (folder / "refused").exists()


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """trained(name): a copy of a run with steps 10 and 20, each with a document and optimizer state."""
    original = tmp_path_factory.mktemp("trained") / "run"
    with Checkpoints(original / "checkpoints") as checkpoints:
        for step in (10, 20):
            arrays = {"params": {"a": jnp.ones(3)}, OPT_STATE: {"b": jnp.ones(3)}}
            checkpoints.save(step, arrays, {"meta": {}})

    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(original, original.with_name(name)))

    return copy


def emptied(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize(
    "harm",
    [
        lambda steps: emptied(steps / "20"),
        lambda steps: shutil.rmtree(steps / "20/opt_state"),
        lambda steps: shutil.rmtree(steps / "20/digests"),
        lambda steps: (steps / "20/_METADATA").unlink(missing_ok=True),
        lambda steps: (steps / "99999").mkdir(),
        lambda steps: (steps / "0099").mkdir(),
        lambda steps: (steps / "\N{ARABIC-INDIC DIGIT NINE}9").mkdir(),
        lambda steps: (steps / "99").touch(),
    ],
    ids=["emptied", "no opt_state", "no index", "no _METADATA", "empty 99999", "0099", "arabic", "a file"],
)
def test_a_newest_step_that_is_damaged_does_not_hide_the_one_before(trained, request, harm, capsys):
    run = trained(request.node.callspec.id)
    harm(run / "checkpoints")
    check_start(load(RunConfig, None, ["--run.dir", str(run)]))
    assert capsys.readouterr().out == ""


def test_a_run_whose_steps_are_all_unreadable_is_not_overwritten(trained):
    run = trained("lost")
    for step in ("10", "20"):
        emptied(run / "checkpoints" / step)
    with pytest.raises(CheckpointError, match=r"none of the steps \[10, 20\] can be read"):
        check_start(load(RunConfig, None, ["--run.dir", str(run)]))


def test_fewer_steps_than_the_run_has_made_are_refused(trained):
    run = trained("fewer")
    check_start(load(RunConfig, None, ["--run.dir", str(run), "--train.steps", "60"]))
    short = load(RunConfig, None, ["--run.dir", str(run), "--train.steps", "19"])
    with pytest.raises(ConfigError, match=r"train\.steps=19 is below step 20, which \S+fewer has reached"):
        check_start(short)


def test_the_effect_of_more_steps_on_the_rates_is_reported(trained, capsys):
    folder = RunFolder(trained("longer"))
    before = load(RunConfig, None, ["--train.steps=20", "--optim.warmup_steps=0", "--optim.table.schedule=constant"])
    longer = dataclasses.replace(before, train=dataclasses.replace(before.train, steps=40))
    log_schedule_changes(Claim(folder, longer, before=before))
    lr, last = before.optim.lr, before.optim.final_fraction
    # Step 21 of 40 is 21/40 of half a cosine; the shorter run had already reached its lowest rate.
    now = lr * (last + (1 - last) * (1 + np.cos(np.pi * 21 / 40)) / 2)
    assert capsys.readouterr().out == (
        f"optim: its cosine schedule now spans 40 steps; the rate of step 21 is {now:.2e}, it was "
        f"{lr * last:.2e} over 20\n"
    )
    log_schedule_changes(Claim(folder, before, before=before))
    assert capsys.readouterr().out == ""


def test_changed_settings_of_the_model_are_reported(folder, capsys):
    settings = ["--model.memory.top_k", "2", "--train.init_from", str(folder / "memory"), "--run.dir", "none"]
    check_start(load(RunConfig, folder / "memory/config.yaml", settings))
    assert capsys.readouterr().out == f"differs from {folder / 'memory'}: model.memory.top_k: 3 -> 2\n"
