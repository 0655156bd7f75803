"""Conversion of runs to Hugging Face folders and back."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drawn import drawn
from memjax.checkpoint import CheckpointError
from memjax.config.data import DataConfig
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ExpertsConfig, ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import ConfigError
from memjax.interop.huggingface import convert as huggingface
from memjax.interop.huggingface.convert import TORCH_MODEL, from_hf, to_hf
from memjax.interop.huggingface.tokenizer import read_tokenizer
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder
from memjax.runs.load import load_as_saved
from memjax.runs.write import write_run

MEMORY = MemoryConfig(layers=(0, 1), num_keys=8, num_heads=2, top_k=4, key_dim=8, value_dim=8, table_dtype="bfloat16")
EXPERTS = PEERConfig(layers=(2,), num_keys=8, num_heads=2, top_k=4, key_dim=8, table_dtype="float32")
SIZES: dict[str, Any] = {"dim": 16, "num_layers": 5, "num_heads": 2, "ffn_dim": 24, "vocab_size": 259}
MIXTURE = ExpertsConfig(layers=(3,), num_experts=2, ffn_dim=8)
MODEL = ModelConfig(**SIZES, memory=MEMORY, peer=EXPERTS, experts=MIXTURE)


def make_run(folder: pathlib.Path, model: ModelConfig = MODEL) -> None:
    config = RunConfig(model=model, data=DataConfig(sequence_length=48))
    write_run(folder, drawn(config.model), ByteTokenizer(), config)


@pytest.fixture(scope="module")
def memory_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "memory"
    make_run(folder)
    return folder


def arrays_of(model: Decoder) -> dict[str, tuple]:
    _, params, tables = split_decoder(model)
    leaves, _ = jax.tree_util.tree_flatten_with_path((params, tables))
    return {jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in leaves}


def test_a_model_with_memory_goes_out_with_its_table_once_and_comes_back_bit_for_bit(memory_run, tmp_path):
    assert to_hf(memory_run, tmp_path / "out", max_bytes=4000)
    files = sorted(path.name for path in tmp_path.glob("out/*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = {name: array for file in files for name, array in load_file(tmp_path / "out" / file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    tables = [name for name, array in tensors.items() if array.shape == (64, 8)]
    assert tables == ["model.tables.shared.weight"]
    assert tensors[tables[0]].dtype == jnp.bfloat16
    assert tensors["model.tables.experts_outputs.weight"].dtype == jnp.float32
    assert tensors["model.tables.experts_inputs.weight"].shape == (64, 16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("memjax", 48)

    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], config["eos_token_id"]) == (1, 2, 2)
    assert generation["pad_token_id"] == 0
    for name in ("configuration_memjax.py", "modeling_memjax.py"):
        assert (tmp_path / "out" / name).read_bytes() == (TORCH_MODEL / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- custom_code" in card
    assert "trust_remote_code=True" in card
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1

    from_hf(tmp_path / "out", tmp_path / "back")
    back, before = (load_as_saved(run) for run in (tmp_path / "back", memory_run))
    assert arrays_of(back.model) == arrays_of(before.model)
    assert back.model.config == before.model.config
    assert back.config.run.dir == str(tmp_path / "back")
    assert back.tokenizer.encode("né <eos>") == before.tokenizer.encode("né <eos>")
    assert (back.tokenizer.bos_id, back.tokenizer.eos_id) == (before.tokenizer.bos_id, before.tokenizer.eos_id)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "read_as"), [("bfloat16",) * 2, ("float32",) * 2, ("float16", "float32")])
def test_rounded_tables_give_the_logits_that_they_are_read_with_and_are_described(dtype, read_as, tmp_path):
    memory = dataclasses.replace(MEMORY, layers=(0,), gate="none")
    peer = dataclasses.replace(EXPERTS, layers=(1,))
    make_run(tmp_path / "run", dataclasses.replace(MODEL, num_layers=2, memory=memory, peer=peer, experts=None))
    assert to_hf(tmp_path / "run", tmp_path / "out", dtype=dtype)
    model = json.loads((tmp_path / "out" / "config.json").read_text())["model"]
    assert [model[section]["table_dtype"] for section in ("memory", "peer")] == [read_as] * 2


def test_files_of_the_original_model_are_kept(memory_run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_logits", lambda model: np.zeros(1))  # logits do not matter here
    to_hf(memory_run, tmp_path / "like")
    fields = json.loads((tmp_path / "like" / "config.json").read_text())
    changed = {"max_position_embeddings": 4096, "eos_token_id": [2, 7]}
    (tmp_path / "like" / "config.json").write_text(json.dumps(fields | changed | {"hidden_size": 1}))
    (tmp_path / "like" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        ConfigError, match="has a different tokenizer from the run's; name the folder that its model came from"
    ):
        to_hf(memory_run, tmp_path / "other", like=tmp_path / "like")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "like" / "config.json", tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"bare has no tokenizer to .* leave like out: .*neither .*tokenizer\.model$"):
        to_hf(memory_run, tmp_path / "other", like=tmp_path / "bare")

    loaded = load_as_saved(memory_run)
    tokenizer = read_tokenizer(tmp_path / "like", None, fields)[1]
    monkeypatch.setattr(huggingface, "load_as_saved", lambda *_, **__: dataclasses.replace(loaded, tokenizer=tokenizer))
    for longest in (None, 77):
        out = tmp_path / f"out_{longest}"
        assert to_hf(memory_run, out, like=tmp_path / "like", longest=longest)
        kept = json.loads((out / "config.json").read_text())
        assert kept == fields | changed | ({"max_position_embeddings": 77} if longest else {})
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / "like" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("other", [1e-3, np.nan])
def test_nothing_is_left_at_the_target_if_the_export_gives_other_logits(other, memory_run, tmp_path, monkeypatch):
    answers = iter([np.zeros((1, 2)), np.full((1, 2), other)])
    monkeypatch.setattr(huggingface, "_logits", lambda model: next(answers))
    monkeypatch.setattr(huggingface, "read_model", lambda *_: None)
    with pytest.raises(CheckpointError, match=rf"gives other logits \(by up to {other}\); nothing is kept"):
        to_hf(memory_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_are_named(memory_run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_logits", lambda model: np.array([0.0, np.nan]))
    with pytest.raises(CheckpointError, match="its logits are not finite"):
        to_hf(memory_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_cannot_hold_the_numbers_is_refused(memory_run, tmp_path, monkeypatch):
    found = load_as_saved(memory_run)
    parts, params, tables = split_decoder(found.model)
    large = parts.merge(jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e5, leaf.dtype), params), tables)
    monkeypatch.setattr(huggingface, "load_as_saved", lambda *_, **__: dataclasses.replace(found, model=large))
    with pytest.raises(CheckpointError, match=r"dtype=float16 cannot hold numbers as large as 1e\+05"):
        to_hf(memory_run, tmp_path / "out", dtype="float16")


def test_a_folder_that_is_not_empty_is_left_alone(memory_run, tmp_path):
    (tmp_path / "kept").write_text("mine")
    for convert in (to_hf, from_hf):
        with pytest.raises(ConfigError, match="already exists and is not empty; name a new folder"):
            convert(memory_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_weights_that_are_not_finite_are_read_and_named(memory_run, tmp_path, capsys):
    to_hf(memory_run, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for name, value in (("model.norm.weight", np.inf), ("model.tables.shared.weight", np.nan)):
        tensors[name] = np.array(tensors[name])
        tensors[name].flat[3] = value
    save_file(tensors, file)
    capsys.readouterr()
    from_hf(tmp_path / "out", tmp_path / "run")
    named = [line.split()[1] for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert named == ["params/norm/scale", "tables/shared"]
    found = split_decoder(load_as_saved(tmp_path / "run").model)[2]["shared"]
    assert np.array_equal(np.asarray(found), tensors["model.tables.shared.weight"], equal_nan=True)


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2}
    source = pathlib.Path(__file__).parents[2] / "fixtures" / "llama" / "llama2"
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "weights")
    (tmp_path / "weights").write_bytes((source / "model.safetensors").read_bytes())
    config = {"model_type": "llama", "vocab_size": 258, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="vocab_size=258 is less than the 259 tokens of the tokenizer"):
        from_hf(tmp_path, tmp_path / "run", tokenizer="byte")
    assert not (tmp_path / "run").exists()
