"""What a config.json means, and what is refused because it would mean something else here."""

import pytest

from memjax.checkpoint import CheckpointError
from memjax.config.memory import MemoryConfig
from memjax.config.model import ExpertsConfig, ModelConfig, RopeScalingConfig
from memjax.interop.huggingface.config import longest_text, read_model_config
from memjax.interop.huggingface.written_config import write_model_config

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


SCALINGS = [
    RopeScalingConfig(kind="linear", factor=3.0),
    RopeScalingConfig(kind="dynamic", factor=3.0, original_length=32),
    RopeScalingConfig(kind="yarn", factor=4.0, original_length=16, beta_fast=20.0, truncate=False, mscale=0.7),
    RopeScalingConfig(
        kind="longrope", factor=4.0, attention_factor=1.2, short_factor=(1.0,) * 16, long_factor=(2.0,) * 16
    ),
]


WINDOWED = {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4}


def read(**changes) -> ModelConfig:
    return read_model_config(LLAMA | changes, "config.json")


def write(config: ModelConfig) -> dict:
    return write_model_config(config, dtype="float32", longest=64, bos=1, eos=[2])


def test_missing_fields_have_the_defaults_of_transformers():
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
        (
            {"model_type": "cohere"},
            'model_type="cohere" must be one of llama, mistral, qwen2, qwen3, smollm3, olmo2: other models',
        ),
        ({"model_type": "olmo3"}, "olmo2: some of its layers have a window and others have none"),
        ({"model_type": None}, "model_type=null must be one of llama"),
        ({"model_type": ["llama"]}, 'model_type=["llama"] must be one of llama'),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read; take the model as it was before"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu" must be "silu"'),
        ({"mlp_bias": True}, "mlp_bias=true must be false: the feed-forward layers have no biases"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 must be 1"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "must be null or of rope_type default, llama3, linear"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "must be null or of rope_type default"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor=null must be a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, 'rope_scaling: factor="2" must be a positive number'),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1, 1]}}, "long_factor=null must be a list of numbers"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1, 1]}},
            "rope_scaling.short_factor holds 1 numbers, must hold 2",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [0, 1], "long_factor": [1, 1]}}, "positive numbers"),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0]},
            'layer_types=["full_attention", "sliding_attention"] with sliding_window=4 must be sliding_attention',
        ),
        (WINDOWED | {"max_window_layers": 1}, 'layer_types=["full_attention", "sliding_attention"] with'),
        (WINDOWED | {"max_window_layers": None}, "max_window_layers=null must be a whole number"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers=[1, 2] must hold 2 times 0 or 1"),
        ({"rope_scaling": "llama3"}, 'rope_scaling="llama3" must be an object or null'),
        ({"rope_scaling": SCALING | {"factor": 0}}, "rope_scaling: factor=0 must be a positive number"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1}}, "high_freq_factor=1.0 must be above low_freq_factor=1.0"),
        ({"hidden_size": "16"}, 'hidden_size="16" must be a whole number from 1 on'),
        ({"hidden_size": True}, "hidden_size=true must be a whole number"),
        ({"hidden_size": 10**20}, "must be a whole number from 1 on"),
        ({"num_hidden_layers": None}, "num_hidden_layers=null must be a whole number"),
        (WINDOWED | {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 1000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"hidden_size": 18}, "num_attention_heads=4 must divide hidden_size=18 into heads"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps=1e-300 must be a number of float32"),
        ({"rms_norm_eps": 10**400}, "must be a positive number"),
        ({"rope_scaling": SCALING | {"factor": 10**400}}, "must be a positive number"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [10**400], "long_factor": [1]}}, "a list of numbers"),
        (
            {"rope_scaling": SCALING | {"original_max_position_embeddings": 1}},
            "rope_scaling: original_max_position_embeddings=1 must be at least 2",
        ),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 must be a positive number"),
        ({"attention_bias": "yes"}, 'attention_bias="yes" must be true or false'),
    ],
)
def test_what_this_decoder_does_not_support_is_refused(fields, message):
    with pytest.raises(CheckpointError, match="config") as error:
        read(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"max_window_layers": 0}, 4),
        ({"layer_types": ["sliding_attention"] * 2}, 4),
        ({"max_window_layers": 2}, None),
        ({"layer_types": ["full_attention"] * 2}, None),
        ({}, None),
        ({"model_type": "smollm3"}, None),
        ({"model_type": "smollm3", "no_rope_layers": [0, 0]}, 4),
    ],
)
def test_a_window_counts_if_layers_use_it(fields, window):
    assert read(**(WINDOWED | fields)).sliding_window == window


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(memory=None),
        ModelConfig(memory=None, num_heads=4, num_kv_heads=2, head_dim=6, attention_bias=True, norm_eps=1e-6),
        ModelConfig(memory=None, num_kv_heads=1, sliding_window=7, tie_embeddings=True),
        ModelConfig(memory=None, num_kv_heads=2, rope_theta=500.0, rope_scaling=RopeScalingConfig(factor=2.0)),
        ModelConfig(memory=MemoryConfig(layers=(2,), value_dim=32), attention_bias=True, sliding_window=3),
        ModelConfig(memory=None, experts=ExpertsConfig(num_experts=3, layers=(1,))),
        ModelConfig(memory=None, num_heads=3, num_kv_heads=3, head_dim=8),
        ModelConfig(memory=None, num_kv_heads=2, attention_bias=True, attention_out_bias=False),
        ModelConfig(memory=None, num_kv_heads=2, attention_bias=True, attention_out_bias=False, sliding_window=5),
        ModelConfig(memory=None, num_kv_heads=2, qk_norm="per_head", head_dim=8),
        ModelConfig(memory=None, num_kv_heads=2, rope_free_layers=(0, 2), attention_bias=True),
        ModelConfig(memory=None, num_kv_heads=2, qk_norm="all_heads", norm_placement="post", attention_bias=True),
        *(ModelConfig(memory=None, num_kv_heads=2, rope_scaling=scaling) for scaling in SCALINGS),
    ],
    ids=[
        "plain",
        "biases",
        "mistral",
        "scaled",
        "memory",
        "experts",
        "odd",
        "qwen2",
        "qwen2_window",
        "qwen3",
        "smollm3",
        "olmo2",
    ]
    + [scaling.kind for scaling in SCALINGS],
)
def test_what_is_written_is_read_as_the_same_model(config):
    fields = write(config)
    again = read_model_config(fields, "config.json")
    assert again.kv_heads == config.kv_heads
    assert (again if config.num_kv_heads else read_model_config(fields | {"num_key_value_heads": None}, "")) == config
    is_dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
    assert longest_text(fields, "config.json") == (32 if is_dynamic else 64)
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["torch_dtype"]) == (1, 2, "float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig(memory=None, attention_bias=True, sliding_window=4),
            "no model of transformers has attention_bias=True",
        ),
        (
            ModelConfig(memory=None, num_heads=3, head_dim=8, attention_bias=True),
            "no model of transformers .* num_heads=3 of dim=64",
        ),
        (ModelConfig(memory=None, qk_norm="per_head", rope_free_layers=(1,)), "no model of transformers has"),
        (ModelConfig(memory=None, qk_norm="all_heads"), "qk_norm=all_heads, norm_placement=pre, "),
        (
            ModelConfig(memory=None, qk_norm="per_head", norm_placement="post"),
            "qk_norm=per_head, norm_placement=post, ",
        ),
        (
            ModelConfig(memory=None, qk_norm="all_heads", norm_placement="post", sliding_window=3),
            "norm_placement=post, sliding_window=3",
        ),
    ],
)
def test_what_has_no_equivalent_is_not_written(config, message):
    with pytest.raises(CheckpointError, match=message):
        write(config)


def test_a_config_with_memory_of_an_earlier_version_is_read():
    fields = write(ModelConfig())
    fields["model"] = {**fields["model"], "qk_norm": True}
    del fields["model"]["norm_placement"]
    assert read_model_config(fields, "config.json") == ModelConfig(qk_norm="per_head")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memjax_format": 1}, "has memjax_format 1, this version of memjax reads 2; export the run again, or use the"),
        ({"model": {"dim": "wide"}}, "model: dim"),
        ({"model": {"memory": None}}, "model.memory=null must hold memory layers"),
        ({"model": None}, "model: "),
    ],
)
def test_a_config_with_memory_is_checked_too(fields, message):
    with pytest.raises(CheckpointError, match="config") as error:
        read_model_config(write(ModelConfig()) | fields, "config.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "yarn", "factor": 4.0}, {"original_length": 2048}),
        ({"type": "yarn", "original_max_position_embeddings": 512}, {"original_length": 512, "factor": 4.0}),
        ({"type": "dynamic", "factor": 2}, {"original_length": 2048}),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0, "beta_fast": None}, {"mscale": None, "beta_fast": 32.0}),
    ],
)
def test_missing_settings_of_a_scaling_have_the_defaults_of_transformers(fields, expected):
    found = read(rope_scaling=fields).rope_scaling
    assert {name: getattr(found, name) for name in expected} == expected


def test_related_families_have_their_layers():
    relative = lambda kind, **fields: read(model_type=kind, num_key_value_heads=2, **fields)
    qwen2, qwen3, smollm3, olmo2 = (relative(kind) for kind in ("qwen2", "qwen3", "smollm3", "olmo2"))
    assert (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.sliding_window) == (True, False, None)
    assert (qwen3.qk_norm, qwen3.head_width, qwen3.attention_bias) == ("per_head", 128, False)
    assert (olmo2.qk_norm, olmo2.norm_placement, olmo2.norm_eps) == ("all_heads", "post", 1e-5)
    assert (smollm3.rope_theta, smollm3.rope_free_layers, smollm3.tie_embeddings) == (2e6, (), True)
    assert relative("smollm3", no_rope_layer_interval=2).rope_free_layers == (1,)
    everywhere = {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2}
    assert relative("qwen2", **everywhere).sliding_window == 7
    assert relative("qwen2", **everywhere | {"use_sliding_window": False, "layer_types": None}).sliding_window is None
