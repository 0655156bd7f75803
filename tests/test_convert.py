"""The convert command in this process: its output, exit codes and files."""

import pathlib

import numpy as np
import pytest
from flax import nnx

from memjax import convert, evaluate
from memjax.config.memory import MemoryConfig
from memjax.interop.huggingface import convert as huggingface
from memjax.runs.load import load
from memjax.runs.saved import read_config

MODELS = pathlib.Path(__file__).parent / "fixtures" / "llama"


def test_a_model_becomes_a_run_that_the_other_commands_read(tmp_path, capsys):
    run = tmp_path / "run"
    assert convert.main(["from-hf", str(MODELS / "llama3_old"), "--out", str(run), "--tokenizer", "byte"]) == 0
    printed = capsys.readouterr().out
    assert f"run        {run}: 2 blocks of width 16, weights in bfloat16" in printed
    assert f"train it   python -m memjax.train {run}/config.yaml --train.init_from {run} --model.param_dtype" in printed
    found = load(run)
    assert found.config.data.sequence_length == 32
    assert found.config.optim.lr < 1e-4
    assert (run / "config.yaml").exists()
    tokens = np.asarray([[1, 250, 17, 33, 33, 128, 64, 2, 99, 180, 7, 211]], np.int32)
    expected = np.load(MODELS / "llama3_old" / "logits.npy")
    np.testing.assert_allclose(
        nnx.jit(lambda model, tokens: model(tokens))(found.model, tokens), expected, rtol=0, atol=1e-4
    )
    assert evaluate.main([str(run)]) == 3
    assert "the run has no text of its own; name a file with --text" in capsys.readouterr().err


def test_the_settings_of_to_hf_arrive(monkeypatch, capsys):
    given = {}

    def to_hf(run, out, **settings):
        given.update(run=run, out=out, **settings)
        return False

    monkeypatch.setattr(huggingface, "to_hf", to_hf)
    arguments = [
        "to_hf",
        "runs/a",
        "--out=b",
        "--step",
        "7",
        "--dtype",
        "bfloat16",
        "--max-length",
        "9",
        "--shard_gb=2",
        "--ema",
    ]
    assert convert.main([*arguments, "--like", "c"]) == 0
    assert given == {
        "run": "runs/a",
        "out": "b",
        "step": 7,
        "ema": True,
        "dtype": "bfloat16",
        "longest": 9,
        "like": "c",
        "max_bytes": 2_000_000_000,
    }
    assert "without the tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name what to do\n\nusage: python -m memjax.convert COMMAND ...\n\n  from-hf "),
        (["from-hff", "x"], 2, "there is no command 'from-hff'; did you mean 'from-hf'?"),
        (["from-hf", "--out", "y"], 2, "HF_FOLDER is missing"),
        (["from-hf", "x"], 2, "out is missing"),
        (["to-hf", "x", "--out", "y", "--step", "last"], 2, "step=last must be latest, best or the number"),
        (
            ["to-hf", "x", "--out", "y", "--max_length", "9999999999"],
            2,
            "max_length=9999999999 must be below 2147483648",
        ),
        (["to-hf", "x", "--out", "y", "--step", "9" * 5000], 2, "must be latest, best or the number of a checkpoint"),
        (["to-hf", "x", "--out", "y", "--shard_gb", "0"], 2, "shard_gb=0.0 must be positive"),
        (["from-hf", "x", "--out", "y", "--tokeniser", "z"], 2, "did you mean 'tokenizer'"),
        (["from-hf", "nowhere", "--out", "y"], 4, "nowhere: there is no such folder"),
        (["to-hf", "nowhere", "--out", "y"], 4, "nowhere: there is no such folder"),
        (["from-hf", str(MODELS / "llama2"), "--out", "y"], 3, "there is neither tokenizer.json nor tokenizer.model"),
        (["from-hf", str(MODELS / "llama2"), "--out", str(MODELS)], 2, "already exists and is not empty"),
    ],
)
def test_what_cannot_be_done_is_reported_with_its_exit_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        found = convert.main(arguments)
    except SystemExit as end:
        found = end.code
    assert found == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_conversion_and_each_has_its_own(capsys):
    assert convert.main(["--help"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("usage: python -m memjax.convert from-hf|to-hf")
    for name in convert.COMMANDS:
        with pytest.raises(SystemExit) as end:
            convert.main([name, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.strip() in whole


def test_an_official_checkpoint_becomes_a_run_and_cannot_get_a_second_memory(tmp_path, capsys):
    official = MODELS.parent / "official"
    assert convert.main(["from-official", str(official), "--out", str(tmp_path / "run"), "--tokenizer", "byte"]) == 0
    assert "2 blocks of width 8, weights in float32, memory in blocks 1" in capsys.readouterr().out
    assert convert.main(["from-official", str(official), "--out", str(tmp_path / "run")]) == 2
    assert "not empty" in capsys.readouterr().err
    # Only a dense run can get a memory; this one already has one.
    settings = ["--memory.layers", "0", "--memory.num_keys", "8"]
    assert convert.main(["upcycle", str(tmp_path / "run"), "--out", str(tmp_path / "new"), *settings]) == 2
    assert "the model already has memory layers, in blocks [1]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_gets_a_memory_beside_its_feed_forward_layers(tmp_path, capsys):
    run = tmp_path / "run"
    assert convert.main(["from-hf", str(MODELS / "llama3_old"), "--out", str(run), "--tokenizer", "byte"]) == 0
    settings = ["--memory.layers", "1", "--memory.num_keys", "8", "--memory.key_dim", "8"]
    assert convert.main(["upcycle", str(run), "--out", str(tmp_path / "new"), *settings]) == 0
    memory = read_config(tmp_path / "new").model.memory
    assert memory == MemoryConfig(layers=(1,), placement="parallel", num_keys=8, key_dim=8)
    assert f"--train.init_from {tmp_path / 'new'}" in capsys.readouterr().out
