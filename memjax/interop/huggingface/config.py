"""Converts `config.json` of Llama and its close relatives, as transformers 4 and 5 write it, to a ModelConfig."""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from memjax.config.model import MOST_LAYERS, ModelConfig, RopeScalingConfig, RopeScalingKind
from memjax.config.renamed import upgraded
from memjax.errors import CheckpointError
from memjax.interop.huggingface.families import FAMILIES, MEMORY_FORMAT, MEMORY_MODEL, has_own_format
from memjax.interop.huggingface.written_config import SHARED_FIELDS
from memjax.io.documents import line_of, read_as

_LARGEST = 1 << 31
"""Exclusive limit of sizes, far above those of any model, so that shapes cannot overflow."""
_OTHER_LAYERS = {
    "olmo": "its layer norms have no parameters",
    "olmo3": "some of its layers have a window and others have none",
    "gemma": "its embeddings are scaled, and its feed-forward layers are GeGLU",
    "qwen2_moe": "one of its experts is shared by all tokens",
    "phi3": "its projections are stored in one matrix",
}
"""Why similar models are not supported."""
_MOST_CHARACTERS = 200
"""Most characters of a value that a message shows."""
_NAMES_THERE = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "original_length": "original_max_position_embeddings",
}
"""Names in config.json of settings that have a different name there."""
_ROPE_SCALING_KINDS: tuple[RopeScalingKind, ...] = get_args(RopeScalingKind)


def read_model_config(config: dict[str, Any], place: str) -> ModelConfig:
    """The model that a config.json describes; param_dtype and table_dtype follow from the weight files instead.

    Raises:
        CheckpointError: a field is missing or of the wrong type, or requests something this decoder does not support.
    """
    fields = _Fields(config, place)
    kind = config.get("model_type")
    if kind == MEMORY_MODEL:
        return _memory_model(config, place)
    if not isinstance(kind, str) or kind not in FAMILIES:
        why = _OTHER_LAYERS.get(str(kind), "other models have other layers")
        raise fields.refused("model_type", f"must be one of {', '.join(FAMILIES)}", why)
    family, absent = FAMILIES[kind], FAMILIES[kind].absent
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{place}: quantization_config must be null: quantised weights are not read; take the model as it was "
            "before it was quantised"
        )
    for name, wanted, why in (
        ("hidden_act", ("silu", "swish"), "the feed-forward layers are SwiGLU"),
        ("mlp_bias", (False,), "the feed-forward layers have no biases"),
        ("partial_rotary_factor", (1, None), "rotary positions rotate whole heads"),
    ):
        if name in config and config[name] not in wanted:
            raise fields.refused(name, f"must be {json.dumps(wanted[0])}", why)
    rope_theta, rope_scaling = _rope(fields, absent)
    sizes = {
        "dim": fields.size("hidden_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": fields.size("num_attention_heads"),
        "num_kv_heads": fields.optional("num_key_value_heads", absent.get("num_key_value_heads")),
        "head_dim": fields.optional("head_dim", absent.get("head_dim")),
        "ffn_dim": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
    }
    if sizes["num_layers"] > MOST_LAYERS:  # before any list of all layers is made
        raise fields.refused(
            "num_hidden_layers", f"must be at most {MOST_LAYERS}", "every block is compiled separately"
        )
    sizes["sliding_window"] = _window(fields, kind, absent, sizes["num_layers"])
    if sizes["head_dim"] and sizes["head_dim"] * sizes["num_heads"] == sizes["dim"]:
        sizes["head_dim"] = None  # newer versions write it even if it is redundant
    try:
        return ModelConfig(
            **sizes,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=fields.number("rms_norm_eps", absent.get("rms_norm_eps", 1e-6)),
            attention_bias=fields.flag("attention_bias") if family.has_bias_flag else kind == "qwen2",
            attention_out_bias=False if kind == "qwen2" else None,
            qk_norm=family.qk_norm,
            norm_placement="post" if kind == "olmo2" else "pre",
            rope_free_layers=_rope_free_layers(fields, sizes["num_layers"]) if kind == "smollm3" else (),
            tie_embeddings=fields.flag("tie_word_embeddings", absent.get("tie_word_embeddings", False)),
            memory=None,
        )
    except ValueError as error:
        raise CheckpointError(f"{place}: describes an impossible model: {_in_its_words(error)}") from error


def longest_text(config: dict[str, Any], place: str) -> int:
    """The context length of a model in tokens, from its config.json."""
    absent = FAMILIES.get(config.get("model_type", ""), FAMILIES["llama"]).absent
    return _Fields(config, place).size("max_position_embeddings", absent["max_position_embeddings"])


def _window(fields: "_Fields", kind: str, absent: Mapping[str, Any], num_layers: int) -> int | None:
    """The sliding window in tokens; None for full attention.

    Raises:
        CheckpointError: some layers have a window and others have none.
    """
    window = fields.optional("sliding_window", absent.get("sliding_window"))
    if kind in ("llama", "olmo2"):
        return None
    types = fields.config.get("layer_types")
    if kind != "mistral":
        if not fields.flag("use_sliding_window"):
            window = None
        elif window is not None and types is None:
            types = _layer_types(fields, kind, num_layers)
        if isinstance(types, list) and len(types) == num_layers and all(name == "full_attention" for name in types):
            return None
    if types is None:
        return window
    wanted = "full_attention" if window is None else "sliding_attention"
    if not isinstance(types, list) or any(name != wanted for name in types):
        raise CheckpointError(
            f"{fields.place}: layer_types={json.dumps(types)[:200]} with sliding_window={window} must be {wanted} "
            "everywhere: all layers have the same window here, or none"
        )
    return window


def _layer_types(fields: "_Fields", kind: str, num_layers: int) -> list[str]:
    """The layer types that transformers assumes for a model with a window whose config does not list them."""
    if kind == "smollm3":
        windowed: Sequence[int] = _rope_free_layers(fields, num_layers)
    else:
        windowed = range(fields.count("max_window_layers", 28), num_layers)
    return [f"{'sliding' if layer in windowed else 'full'}_attention" for layer in range(num_layers)]


def _rope_free_layers(fields: "_Fields", num_layers: int) -> tuple[int, ...]:
    """The layers of a SmolLM 3 without rotary positions."""
    turned = fields.config.get("no_rope_layers")  # 1 stands for a layer with rotary positions
    if turned is None:
        interval = fields.size("no_rope_layer_interval", 4)
        turned = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(turned, list) or len(turned) != num_layers or any(flag not in (0, 1) for flag in turned):
        raise fields.refused("no_rope_layers", f"must hold {num_layers} times 0 or 1", "it is one number a layer")
    return tuple(layer for layer, flag in enumerate(turned) if not flag)


def _rope(fields: "_Fields", absent: Mapping[str, Any]) -> tuple[float, RopeScalingConfig | None]:
    """Base and scaling of the rotary frequencies, from rope_theta and rope_scaling, or from rope_parameters."""
    config, place = fields.config, fields.place
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise fields.refused(name, "must be an object or null", "it names the kind of scaling and its numbers")
    inner = _Fields(rope, f"{place}: {name}")
    theta = inner.number("rope_theta", fields.number("rope_theta", absent.get("rope_theta", 10000.0)))
    if rope.get("partial_rotary_factor") not in (1, None):
        raise inner.refused("partial_rotary_factor", "must be 1", "rotary positions rotate whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, dict) for value in rope.values()):
        return theta, None
    known: RopeScalingKind | None = next((name for name in _ROPE_SCALING_KINDS if name == kind), None)
    if known is None:
        kinds = ", ".join(_ROPE_SCALING_KINDS)
        raise CheckpointError(
            f"{place}: {name}={json.dumps(rope)} must be null or of rope_type default, {kinds}; other kinds of "
            "scaling give other logits at every length, and are not supported"
        )
    try:
        return theta, RopeScalingConfig(kind=known, **_scaling_settings(known, inner, fields, absent))
    except ValueError as error:
        raise CheckpointError(f"{place}: {name}: {_in_its_words(error)}") from error


def _in_its_words(error: ValueError) -> str:
    """The message of an error in a model's settings, with their names in config.json."""
    return re.sub(r"\b\w+(?==)", lambda name: _NAMES_THERE.get(name[0], name[0]), line_of(error))


def _scaling_settings(kind: str, inner: "_Fields", fields: "_Fields", absent: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a kind of scaling, with transformers' defaults for missing ones."""
    longest = fields.size("max_position_embeddings", absent["max_position_embeddings"])
    if kind == "linear":
        return {"factor": inner.number("factor")}
    if kind == "dynamic":
        return {"factor": inner.number("factor"), "original_length": longest}
    name = "original_max_position_embeddings"
    if kind == "llama3":
        found = {name: inner.number(name) for name in SHARED_FIELDS}
        return {**found, "original_length": inner.size(name)}
    # Some models set it outside rope_scaling, which then takes precedence.
    original = fields.optional(name, None) or inner.optional(name, None) or longest
    found = {"original_length": original, "factor": inner.optional_number("factor") or longest / original}
    found["attention_factor"] = inner.optional_number("attention_factor")
    if kind == "longrope":
        return {**found, **{name: inner.numbers(name) for name in ("short_factor", "long_factor")}}
    found |= {name: inner.optional_number(name) for name in ("mscale", "mscale_all_dim")}
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        found[name] = inner.optional_number(name) or default
    return {**found, "truncate": inner.flag("truncate", True)}


def _memory_model(config: dict[str, Any], place: str) -> ModelConfig:
    if config.get("memjax_format") != MEMORY_FORMAT:
        raise CheckpointError(
            f"{place}: has memjax_format {config.get('memjax_format')}, this version of memjax reads {MEMORY_FORMAT}; "
            "export the run again, or use the version that wrote it"
        )
    settings = upgraded({"model": config.get("model")})["model"]
    try:
        model = read_as(ModelConfig, settings)
    except ValueError as error:
        raise CheckpointError(f"{place}: model: {line_of(error)}") from error
    if not has_own_format(model):
        raise CheckpointError(
            f"{place}: model.memory=null must hold memory layers, or model.experts experts, where model_type is "
            f"{MEMORY_MODEL}"
        )
    return model


@dataclasses.dataclass(frozen=True, slots=True)
class _Fields:
    """Reads fields of a config with strict types: true is not a number."""

    config: dict[str, Any]
    place: str

    def refused(self, name: str, rule: str, why: str) -> CheckpointError:
        """The error for an unsupported value of a field."""
        value = json.dumps(self.config.get(name))
        value = value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}..."
        return CheckpointError(f"{self.place}: {name}={value} {rule}: {why}")

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
            raise self.refused(name, "must be a whole number from 1 on", "it is a size of the model")
        return value

    def optional(self, name: str, default: int | None) -> int | None:
        """A size, or null."""
        return None if self.config.get(name, default) is None else self.size(name, default)

    def count(self, name: str, default: int) -> int:
        """A non-negative integer."""
        return 0 if self.config.get(name) == 0 else self.size(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.config.get(name, default)
        # Integers may be too large for a float.
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.refused(name, "must be a positive number", "the model cannot be computed without it")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None for null and, as in transformers, for 0."""
        return self.number(name) if self.config.get(name) else None

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self.config.get(name)
        is_number = lambda number: type(number) in (int, float) and abs(number) <= sys.float_info.max
        if not isinstance(value, list) or not all(map(is_number, value)):
            raise self.refused(name, "must be a list of numbers", "there is one for each pair of a head")
        return tuple(map(float, value))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, "must be true or false", "it determines which weights exist")
        return value
