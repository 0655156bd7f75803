"""`config.json` of Hugging Face's Llama and Mistral, as transformers 4 and 5 write it, and ModelConfig."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pydantic

from memjax.config import ModelConfig, RopeScalingConfig
from memjax.errors import CheckpointError
from memjax.interop.model_card import one_or_many

MEMORY_MODEL = "memjax"
"""The model_type of what transformers has no name for: a decoder with memory layers."""
MEMORY_FORMAT = 1
"""Of the config of such a model; raised when older code could not read it."""

_LARGEST = 1 << 31
"""No size of a model comes near; shapes with larger ones are not worth an overflow."""
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
"""What a field means that is not there, by model_type."""


def read_model_config(config: dict[str, Any], place: str) -> ModelConfig:
    """The model that a config.json describes; param_dtype and table_dtype are the files' to say.

    Args:
        config: the content of the file.
        place: the file, for messages.

    Raises:
        CheckpointError: a field is missing, of the wrong type, or asks for what this decoder does not have.
    """
    fields = _Fields(config, place)
    kind = config.get("model_type")
    if kind == MEMORY_MODEL:
        return _memory_model(config, place)
    if kind not in _ABSENT:
        raise fields.refused("model_type", f"must be {' or '.join(_ABSENT)}", "other models have other layers")
    absent = _ABSENT[kind]
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{place}: quantization_config must be null: quantised weights are not read; take the model as it was "
            "before it was quantised"
        )
    for name, wanted, why in (
        ("hidden_act", ("silu", "swish"), "the feed-forward layers are SwiGLU"),
        ("mlp_bias", (False,), "the feed-forward layers have no biases"),
        ("partial_rotary_factor", (1, None), "rotary positions turn whole heads"),
    ):
        if name in config and config[name] not in wanted:
            raise fields.refused(name, f"must be {json.dumps(wanted[0])}", why)
    rope_theta, rope_scaling = _rope(fields)
    window = fields.optional("sliding_window", absent["sliding_window"]) if kind == "mistral" else None
    sizes = {
        "dim": fields.size("hidden_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": fields.size("num_attention_heads"),
        "num_kv_heads": fields.optional("num_key_value_heads", absent["num_key_value_heads"]),
        "head_dim": fields.optional("head_dim", None),
        "ffn_dim": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "sliding_window": window,
    }
    if sizes["head_dim"] and sizes["head_dim"] * sizes["num_heads"] == sizes["dim"]:
        sizes["head_dim"] = None  # newer versions write it even where it says nothing new
    try:
        return ModelConfig(
            **sizes,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            attention_bias=fields.flag("attention_bias") if kind == "llama" else False,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            memory=None,
        )
    except ValueError as error:
        raise CheckpointError(f"{place}: describes no model that can be: {error}") from error


def longest_text(config: dict[str, Any], place: str) -> int:
    """Tokens that a model takes at once, as its config.json says."""
    absent = _ABSENT.get(config.get("model_type", ""), _ABSENT["llama"])
    return _Fields(config, place).size("max_position_embeddings", absent["max_position_embeddings"])


def write_model_config(
    config: ModelConfig, *, dtype: str, longest: int, bos: int, eos: Sequence[int]
) -> dict[str, Any]:
    """The config.json of a model, which transformers 4 and 5 both read; with memory layers one of this project's own.

    Args:
        config: the model.
        dtype: of the weights in the files.
        longest: tokens that it takes at once.
        bos: id of the token that begins texts.
        eos: ids of the tokens that end them.

    Raises:
        CheckpointError: the model is neither a Llama nor a Mistral, nor one with lookups.
    """
    if config.experts is not None:
        raise CheckpointError(
            "model.experts must be null: a model with experts cannot be written as a folder of Hugging Face; "
            "evaluate and generate read the run itself"
        )
    both = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": longest,
        "bos_token_id": bos,
        "eos_token_id": one_or_many(eos),
        "torch_dtype": dtype,
    }
    if config.lookups:
        names = {"architectures": ["MemjaxDecoder"], "model_type": MEMORY_MODEL, "memjax_format": MEMORY_FORMAT}
        return {**names, **both, "model": dataclasses.asdict(config)}
    if config.sliding_window is not None and config.attention_bias:
        raise CheckpointError(
            f"attention_bias=true together with sliding_window={config.sliding_window} is neither a Llama (no window) "
            "nor a Mistral (no biases) of Hugging Face, so there is no folder to write"
        )
    if config.dim % config.num_heads:
        raise CheckpointError(
            f"num_heads={config.num_heads} must divide dim={config.dim}: transformers refuses other models, even where "
            "head_dim is set, so there is no folder to write"
        )
    if config.sliding_window is None:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": config.attention_bias}
    else:
        names = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        kind = {**names, "sliding_window": config.sliding_window}
    return {
        **kind,
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
        # In the words of transformers 4, which 5 understands too.
        "rope_scaling": config.rope_scaling and _llama3(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _llama3(scaling: RopeScalingConfig) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


def _rope(fields: "_Fields") -> tuple[float, RopeScalingConfig | None]:
    """Base and scaling of the rotary frequencies: rope_theta and rope_scaling, or rope_parameters with both in it."""
    config, place = fields.config, fields.place
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise fields.refused(name, "must be an object or null", "it names the kind of scaling and its numbers")
    inner = _Fields(rope, f"{place}: {name}")
    theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") not in (1, None):
        raise inner.refused("partial_rotary_factor", "must be 1", "rotary positions turn whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, dict) for value in rope.values()):
        return theta, None
    if kind != "llama3":
        raise CheckpointError(
            f"{place}: {name}={json.dumps(rope)} must be null or of rope_type default or llama3; other ways of scaling "
            "give other logits at every length, and are not there"
        )
    try:
        return theta, RopeScalingConfig(
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_length=inner.size("original_max_position_embeddings"),
        )
    except ValueError as error:
        raise CheckpointError(f"{place}: {name}: {error}") from error


def _memory_model(config: dict[str, Any], place: str) -> ModelConfig:
    if config.get("memjax_format") != MEMORY_FORMAT:
        raise CheckpointError(
            f"{place}: has memjax_format {config.get('memjax_format')}, this version of memjax reads {MEMORY_FORMAT}; "
            "use the version that wrote it"
        )
    try:
        # JSON is what pydantic reads strictly and yet turns lists into tuples from.
        model = pydantic.TypeAdapter(ModelConfig).validate_json(json.dumps(config.get("model")), strict=True)
    except pydantic.ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise CheckpointError(f"{place}: model: {reason}") from error
    if not model.lookups:
        raise CheckpointError(f"{place}: model.memory=null must hold memory layers where model_type is {MEMORY_MODEL}")
    return model


@dataclasses.dataclass(frozen=True, slots=True)
class _Fields:
    """Reads fields of a config strictly: a size is a whole number, and true is none."""

    config: dict[str, Any]
    place: str

    def refused(self, name: str, rule: str, why: str) -> CheckpointError:
        """What to raise for a field that cannot be honoured."""
        return CheckpointError(f"{self.place}: {name}={json.dumps(self.config.get(name))} {rule}: {why}")

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        value = self.config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
            raise self.refused(name, "must be a whole number from 1 on", "it is a size of the model")
        return value

    def optional(self, name: str, default: int | None) -> int | None:
        """A size, or null."""
        return None if self.config.get(name, default) is None else self.size(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refused(name, "must be a positive number", "the model cannot be computed without it")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where it is not there."""
        value = self.config.get(name, False)
        if not isinstance(value, bool):
            raise self.refused(name, "must be true or false", "it decides which weights there are")
        return value
