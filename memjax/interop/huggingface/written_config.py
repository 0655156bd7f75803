"""A ModelConfig as `config.json`, which transformers 4 and 5 both read."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from memjax.config.model import ModelConfig, RopeScalingConfig
from memjax.errors import CheckpointError
from memjax.interop.huggingface.families import FAMILIES, MEMORY_CODE, MEMORY_FORMAT, MEMORY_MODEL, has_own_format
from memjax.interop.model_card import one_or_many
from memjax.models.rotary import attention_factor

SHARED_FIELDS = ("factor", "low_freq_factor", "high_freq_factor")
"""Fields of rotary scaling that have the same name in transformers."""
_YARN_FIELDS = ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")


def write_model_config(
    config: ModelConfig, *, dtype: str, longest: int, bos: int, eos: Sequence[int]
) -> dict[str, Any]:
    """The config.json of a model, which transformers 4 and 5 both read; in memjax's own format if necessary.

    Raises:
        CheckpointError: transformers has no such model, and it has neither memory layers nor experts.
    """
    both = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": longest,
        "bos_token_id": bos,
        "eos_token_id": one_or_many(eos),
        "torch_dtype": dtype,
    }
    if has_own_format(config):
        names = {"architectures": ["MemjaxForCausalLM"], "auto_map": MEMORY_CODE, "model_type": MEMORY_MODEL}
        own = {"memjax_format": MEMORY_FORMAT, "model": dataclasses.asdict(config), "table_device": "cuda"}
        return {**names, **both, **own}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        both["max_position_embeddings"] = scaling.original_length  # beyond it the frequencies change
    return {
        **_family(config),
        **both,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        # In the format of transformers 4, which 5 also reads.
        "rope_scaling": scaling and _scaling_fields(scaling),
        # transformers 4 expects that of longrope outside rope_scaling.
        **(_original_length(scaling) if scaling is not None and scaling.kind == "longrope" else {}),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _family(config: ModelConfig) -> dict[str, Any]:
    """The model_type that has the model's layers, and the fields that only this type has.

    Raises:
        CheckpointError: no type has them.
    """
    for name, has_layers, own in _families(config):
        if has_layers:
            return {"architectures": [FAMILIES[name].architecture], "model_type": name, **own}
    raise CheckpointError(
        f"no model of transformers has attention_bias={config.attention_bias}, attention_out_bias={_out_bias(config)}, "
        f"qk_norm={config.qk_norm}, norm_placement={config.norm_placement}, sliding_window={config.sliding_window}, "
        f"rope_free_layers={list(config.rope_free_layers)} and num_heads={config.num_heads} of dim={config.dim} "
        "together, so there is no folder to write"
    )


def _out_bias(config: ModelConfig) -> bool:
    return config.attention_bias if config.attention_out_bias is None else config.attention_out_bias


def _families(config: ModelConfig) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Every model_type, whether it has the model's layers, and the fields that only this type has."""
    window, bias, free = config.sliding_window, config.attention_bias, config.rope_free_layers
    is_pre, same_bias = config.norm_placement == "pre", _out_bias(config) == bias
    is_plain = is_pre and config.qk_norm == "none" and not free
    biased, windowed = {"attention_bias": bias}, {"use_sliding_window": window is not None, "sliding_window": window}
    layers = {"max_window_layers": 0 if window is not None else config.num_layers}
    # A Llama's width must be divisible by its number of heads, a Mistral's need not be.
    divides = config.dim % config.num_heads == 0
    yield "llama", is_plain and same_bias and window is None and divides, biased
    yield "mistral", is_plain and same_bias and not bias, {"sliding_window": window}
    yield "qwen2", is_plain and bias and not same_bias, windowed | layers
    is_qwen3 = is_pre and config.qk_norm == "per_head" and same_bias and not free
    yield "qwen3", is_qwen3, biased | windowed | layers
    is_smollm3 = is_pre and config.qk_norm == "none" and same_bias and window is None and bool(free)
    turned = [int(layer not in free) for layer in range(config.num_layers)]
    yield "smollm3", is_smollm3, biased | windowed | {"no_rope_layers": turned, "pad_token_id": None}
    is_olmo2 = not is_pre and config.qk_norm == "all_heads" and same_bias and window is None and not free
    yield "olmo2", is_olmo2, biased | {"pad_token_id": None}


def _original_length(scaling: RopeScalingConfig) -> dict[str, Any]:
    return {"original_max_position_embeddings": scaling.original_length}


def _scaling_fields(scaling: RopeScalingConfig) -> dict[str, Any]:
    length = _original_length(scaling)
    match scaling.kind:
        case "linear" | "dynamic":
            fields = {"factor": scaling.factor}
        case "yarn":
            fields = {name: getattr(scaling, name) for name in _YARN_FIELDS} | length
        case "longrope":
            factors = {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
            # transformers 4 would compute it from max_position_embeddings.
            fields = {"factor": scaling.factor, "attention_factor": attention_factor(scaling), **factors, **length}
        case _:
            fields = {name: getattr(scaling, name) for name in SHARED_FIELDS} | length
    return {"rope_type": scaling.kind, **{name: value for name, value in fields.items() if value is not None}}
