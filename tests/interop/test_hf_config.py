"""What a config.json means, and what is refused because it would mean something else here."""

import pytest

from memjax.checkpoint import CheckpointError
from memjax.config import ExpertsConfig, MemoryConfig, ModelConfig, RopeScalingConfig
from memjax.interop.hf_config import longest_text, read_model_config, write_model_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MISTRAL = LLAMA | {"model_type": "mistral", "num_attention_heads": 8}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes) -> ModelConfig:
    return read_model_config(LLAMA | changes, "config.json")


def write(config: ModelConfig) -> dict:
    return write_model_config(config, dtype="float32", longest=64, bos=1, eos=[2])


def test_fields_that_are_not_there_mean_what_transformers_takes_them_for():
    llama, mistral = read(), read_model_config(MISTRAL, "config.json")
    assert (llama.kv_heads, llama.norm_eps, llama.rope_theta, llama.sliding_window) == (4, 1e-6, 1e4, None)
    assert (llama.tie_embeddings, llama.attention_bias, llama.head_width, llama.memory) == (False, False, 4, None)
    assert (mistral.kv_heads, mistral.sliding_window) == (8, 4096)
    assert read_model_config(MISTRAL | {"sliding_window": None}, "").sliding_window is None
    assert [longest_text(fields, "") for fields in (LLAMA, MISTRAL)] == [2048, 131072]


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000, "rope_scaling": SCALING},
        {"rope_theta": 500000.0, "rope_scaling": {"type": SCALING["rope_type"], **SCALING}},
        {"rope_parameters": {"rope_theta": 500000.0, **SCALING}},
        {"rope_theta": 1.0, "rope_scaling": None, "rope_parameters": {"rope_theta": 500000.0, **SCALING}},
    ],
)
def test_rope_is_read_as_every_version_writes_it(fields):
    config = read(**fields)
    assert config.rope_theta == 500000
    assert config.rope_scaling == RopeScalingConfig(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, 'model_type="qwen2" must be llama or mistral: other models have other layers'),
        ({"model_type": None}, "model_type=null must be llama or mistral"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read; take the model as it was before"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu" must be "silu"'),
        ({"mlp_bias": True}, "mlp_bias=true must be false: the feed-forward layers have no biases"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 must be 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be null or of rope_type default or llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "must be null or of rope_type default or llama3"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "must be null or of rope_type default"),
        ({"rope_scaling": "llama3"}, 'rope_scaling="llama3" must be an object or null'),
        ({"rope_scaling": SCALING | {"factor": 0}}, "rope_scaling: factor=0 must be a positive number"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1}}, "high_freq_factor=1.0 must be above low_freq_factor=1.0"),
        ({"hidden_size": "16"}, 'hidden_size="16" must be a whole number from 1 on'),
        ({"hidden_size": True}, "hidden_size=true must be a whole number"),
        ({"hidden_size": 10**20}, "must be a whole number from 1 on"),
        ({"num_hidden_layers": None}, "num_hidden_layers=null must be a whole number"),
        ({"num_key_value_heads": 3}, "describes no model that can be: num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 must be a positive number"),
        ({"attention_bias": "yes"}, 'attention_bias="yes" must be true or false'),
    ],
)
def test_what_this_decoder_does_not_do_is_refused(fields, message):
    with pytest.raises(CheckpointError, match="config") as error:
        read(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(memory=None),
        ModelConfig(memory=None, num_heads=4, num_kv_heads=2, head_dim=6, attention_bias=True, norm_eps=1e-6),
        ModelConfig(memory=None, num_kv_heads=1, sliding_window=7, tie_embeddings=True),
        ModelConfig(memory=None, num_kv_heads=2, rope_theta=500.0, rope_scaling=RopeScalingConfig(factor=2.0)),
        ModelConfig(memory=MemoryConfig(layers=(2,), value_dim=32), attention_bias=True, sliding_window=3),
    ],
    ids=["plain", "biases", "mistral", "scaled", "memory"],
)
def test_what_is_written_is_read_as_the_same_model(config):
    fields = write(config)
    again = read_model_config(fields, "config.json")
    assert again.kv_heads == config.kv_heads
    assert (again if config.num_kv_heads else read_model_config(fields | {"num_key_value_heads": None}, "")) == config
    assert longest_text(fields, "config.json") == 64
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["torch_dtype"]) == (1, 2, "float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(memory=None, attention_bias=True, sliding_window=4), "neither a Llama .* nor a Mistral"),
        (ModelConfig(memory=None, num_heads=3, head_dim=8), "num_heads=3 must divide dim=64"),
        (ModelConfig(experts=ExpertsConfig()), r"model\.experts must be null: a model with experts cannot be written"),
    ],
)
def test_what_has_no_form_there_is_not_written(config, message):
    with pytest.raises(CheckpointError, match=message):
        write(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memjax_format": 2}, "has memjax_format 2, this version of memjax reads 1; use the version that wrote it"),
        ({"model": {"dim": "wide"}}, "model: dim"),
        ({"model": {"memory": None}}, "model.memory=null must hold memory layers"),
        ({"model": None}, "model: "),
    ],
)
def test_a_config_with_memory_is_checked_too(fields, message):
    with pytest.raises(CheckpointError, match="config") as error:
        read_model_config(write(ModelConfig()) | fields, "config.json")
    assert message in str(error.value)
