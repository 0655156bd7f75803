"""Weights of transformers give its logits, and are written back with the same bits; see fixtures/make_llama.py."""

import json
import pathlib

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from memjax.checkpoint import CheckpointError
from memjax.config.model import ModelConfig
from memjax.interop.huggingface.config import read_model_config
from memjax.interop.huggingface.safetensors import open_tensors
from memjax.interop.huggingface.tensors import compare_bits, read_model, write_model
from memjax.models.decoder import Decoder

MODELS = pathlib.Path(__file__).parents[2] / "fixtures" / "llama"
TOKENS = np.asarray([[1, 250, 17, 33, 33, 128, 64, 2, 99, 180, 7, 211]], np.int32)
Tensors = dict[str, np.ndarray]

forward = nnx.jit(lambda model, tokens: model(tokens))


def config_of(name: str) -> ModelConfig:
    return read_model_config(json.loads((MODELS / name / "config.json").read_text()), name)


def read(folder: pathlib.Path, config: ModelConfig) -> Decoder:
    with open_tensors(folder) as files:
        return read_model(files, config, str(folder))


def tensors_in(folder: pathlib.Path) -> Tensors:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def bits(tensors: Tensors) -> dict[str, tuple]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors.items()}


@pytest.mark.parametrize("name", ["llama2", "llama3", "biases", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"])
def test_a_model_of_transformers_has_its_logits_here_and_keeps_its_bits(name, tmp_path):
    model = read(MODELS / name, config_of(name))
    expected = np.load(MODELS / name / "logits.npy")
    assert np.abs(expected).max() > 1, "the tolerance would mean nothing"
    np.testing.assert_allclose(forward(model, TOKENS), expected, rtol=0, atol=1e-4)
    # float16 is not a dtype of our decoders, so it is widened to float32 and written back.
    write_model(tmp_path, model, dtype="float16" if name == "mistral" else None, max_bytes=10**9)
    assert bits(tensors_in(tmp_path)) == bits(tensors_in(MODELS / name))


def test_configs_of_transformers_4_and_5_mean_the_same_model(tmp_path):
    assert config_of("llama3_old") == config_of("llama3")
    model = read(MODELS / "llama3_old", config_of("llama3_old"))
    assert model.config.param_dtype == "bfloat16"
    write_model(tmp_path, model, dtype=None, max_bytes=10**9)
    assert bits(tensors_in(tmp_path)) == bits(tensors_in(MODELS / "llama3_old"))


def change(tensors: Tensors, name: str, array: np.ndarray | None) -> Tensors:
    return {other: kept for other, kept in tensors.items() if other != name} | ({} if array is None else {name: array})


NORM, QUERY, HEAD = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (QUERY, None, f"{QUERY} is missing"),
        (f"{QUERY}_2", np.zeros(3, np.float32), f"{QUERY}_2 is not part of this model"),
        (QUERY, np.zeros((16, 15), np.float32), r"has the shape \[16, 15\], must have \[16, 16\]"),
        (NORM, np.zeros(16, np.int8), f"tensor '{NORM}' is of type I8, must be one of F64, F32, F16, BF16: quantised"),
        (NORM, np.zeros(16, np.float64), "arrays are in float64; set JAX_ENABLE_X64=1"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(name, array, message, tmp_path):
    save_file(change(tensors_in(MODELS / "llama2"), name, array), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, config_of("llama2"))


def test_more_layers_than_tensors_are_refused_before_they_are_built(tmp_path):
    save_file(tensors_in(MODELS / "llama2"), tmp_path / "model.safetensors")
    fields = json.loads((MODELS / "llama2" / "config.json").read_text()) | {"num_hidden_layers": 1000}
    with pytest.raises(CheckpointError, match="num_layers=1000 are more than the 21 tensors"):
        read(tmp_path, read_model_config(fields, "config.json"))


def test_extra_tensors_of_older_checkpoints_are_ignored(tmp_path):
    tensors = tensors_in(MODELS / "llama3")
    tensors |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        HEAD: tensors["model.embed_tokens.weight"],
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert read(tmp_path, config_of("llama3")).head is None
    save_file(tensors | {HEAD: tensors[HEAD] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings=true, yet lm_head.weight differs"):
        read(tmp_path, config_of("llama3"))


def test_mixed_types_become_the_one_that_holds_them_all(tmp_path):
    tensors = tensors_in(MODELS / "llama3_old")
    save_file(tensors | {NORM: tensors[NORM].astype(np.float32)}, tmp_path / "model.safetensors")
    model = read(tmp_path, config_of("llama3_old"))
    assert model.config.param_dtype == "float32"
    assert model.norm.scale is not None
    np.testing.assert_array_equal(model.norm.scale[...], tensors[NORM].astype(np.float32))


def test_a_bit_that_changed_on_disk_is_found(tmp_path):
    model = read(MODELS / "llama3", config_of("llama3"))
    write_model(tmp_path, model, dtype=None, max_bytes=10**9)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with open_tensors(tmp_path) as files, pytest.raises(CheckpointError, match="is not what was written"):
        compare_bits(model, files, dtype=None)


def test_tied_weights_may_be_stored_under_either_name(tmp_path):
    tensors = tensors_in(MODELS / "llama3")
    expected = read(MODELS / "llama3", config_of("llama3"))
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {HEAD: embedding}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(read(tmp_path, config_of("llama3")).embed.embedding, expected.embed.embedding)


def test_names_of_a_model_without_its_head_and_buffers_of_any_type_are_understood(tmp_path):
    tensors = {name.removeprefix("model."): array for name, array in tensors_in(MODELS / "llama3").items()}
    tensors["layers.1.self_attn.rotary_emb.cos_cached"] = np.zeros((2, 2), np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    expected = read(MODELS / "llama3", config_of("llama3"))
    found = read(tmp_path, config_of("llama3"))
    np.testing.assert_array_equal(found.norm.scale, expected.norm.scale)
    np.testing.assert_array_equal(found.embed.embedding, expected.embed.embedding)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_model_that_was_saved_inside_another_module_is_read(prefix, tmp_path):
    tensors = tensors_in(MODELS / "llama3")
    tensors[HEAD] = tensors["model.embed_tokens.weight"].copy()
    save_file({f"{prefix}{name}": array for name, array in tensors.items()}, tmp_path / "model.safetensors")
    found = read(tmp_path, config_of("llama3"))
    np.testing.assert_array_equal(found.norm.scale, tensors[NORM])
    np.testing.assert_array_equal(found.embed.embedding, tensors["model.embed_tokens.weight"])


def test_a_head_that_is_missing_says_which_field_to_look_at(tmp_path):
    save_file(change(tensors_in(MODELS / "llama2"), HEAD, None), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing while tie_word_embeddings=false; set it"):
        read(tmp_path, config_of("llama2"))
