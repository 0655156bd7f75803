"""`config.json` of Hugging Face's Llama and its near relatives, as transformers 4 and 5 write it, as ModelConfig."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, get_args

from memjax.config.model import ModelConfig, QKNorm, RopeScalingConfig, RopeScalingKind
from memjax.config.renamed import upgraded
from memjax.config.validation import from_saved
from memjax.errors import CheckpointError
from memjax.interop.model_card import one_or_many
from memjax.models.rotary import attention_factor

MEMORY_MODEL = "memjax"
"""The model_type of what transformers has no name for: a decoder with memory layers or experts."""
MEMORY_FORMAT = 2
"""Of the config of such a model; raised when older code could not read it."""
MEMORY_CODE = {
    "AutoConfig": "configuration_memjax.MemjaxConfig",
    "AutoModel": "modeling_memjax.MemjaxModel",
    "AutoModelForCausalLM": "modeling_memjax.MemjaxForCausalLM",
}
"""The classes by which transformers runs such a model, in the files that lie next to its config."""

_LARGEST = 1 << 31
"""No size of a model comes near; shapes with larger ones are not worth an overflow."""
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
}
"""What a field means that is not there, by model_type; null where it is not named."""
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
_OTHER_LAYERS = {
    "olmo": "its layer norms have no parameters",
    "olmo3": "some of its layers have a window and others have none",
    "gemma": "its embeddings are scaled, and its feed-forward layers are GeGLU",
    "qwen2_moe": "its experts have one that all tokens share",
    "phi3": "its projections are stored in one matrix",
}
"""Why models that look alike are not read."""
_LETTERS = 200
"""Of a value that messages show."""
ROPE_SCALING_KINDS: tuple[RopeScalingKind, ...] = get_args(RopeScalingKind)
_WITH_BIAS_FLAG = ("llama", "qwen3", "smollm3", "olmo2")
"""Whose config says whether the attention has biases."""
_QK_NORMS: dict[str, QKNorm] = {"qwen3": "per_head", "olmo2": "all_heads"}


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
    if not isinstance(kind, str) or kind not in _ABSENT:
        why = _OTHER_LAYERS.get(str(kind), "other models have other layers")
        raise fields.refused("model_type", f"must be one of {', '.join(_ABSENT)}", why)
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
    sizes["sliding_window"] = _window(fields, kind, absent, sizes["num_layers"])
    if sizes["head_dim"] and sizes["head_dim"] * sizes["num_heads"] == sizes["dim"]:
        sizes["head_dim"] = None  # newer versions write it even where it says nothing new
    try:
        return ModelConfig(
            **sizes,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=fields.number("rms_norm_eps", absent.get("rms_norm_eps", 1e-6)),
            attention_bias=fields.flag("attention_bias") if kind in _WITH_BIAS_FLAG else kind == "qwen2",
            attention_out_bias=False if kind == "qwen2" else None,
            qk_norm=_QK_NORMS.get(kind, "none"),
            norm_placement="post" if kind == "olmo2" else "pre",
            rope_free_layers=_rope_free_layers(fields, sizes["num_layers"]) if kind == "smollm3" else (),
            tie_embeddings=fields.flag("tie_word_embeddings", absent.get("tie_word_embeddings", False)),
            memory=None,
        )
    except ValueError as error:
        raise CheckpointError(f"{place}: describes no model that can be: {error}") from error


def has_own_format(config: ModelConfig) -> bool:
    """Whether a model is written as one of this project's own, with the code to run it."""
    return bool(config.lookups) or config.experts is not None


def longest_text(config: dict[str, Any], place: str) -> int:
    """Tokens that a model takes at once, as its config.json says."""
    absent = _ABSENT.get(config.get("model_type", ""), _ABSENT["llama"])
    return _Fields(config, place).size("max_position_embeddings", absent["max_position_embeddings"])


def _window(fields: "_Fields", kind: str, absent: dict[str, Any], num_layers: int) -> int | None:
    """Tokens that each token sees.

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
            full = fields.config.get("max_window_layers", 28) if kind != "smollm3" else num_layers
            types = [f"{'sliding' if layer >= full else 'full'}_attention" for layer in range(num_layers)]
    if types is None:
        return window
    wanted = "full_attention" if window is None else "sliding_attention"
    if not isinstance(types, list) or any(name != wanted for name in types):
        raise CheckpointError(
            f"{fields.place}: layer_types={json.dumps(types)[:200]} with sliding_window={window} must be {wanted} "
            "everywhere: all layers have the same window here, or none"
        )
    return window


def _rope_free_layers(fields: "_Fields", num_layers: int) -> tuple[int, ...]:
    """The layers of a SmolLM 3 without rotary positions."""
    turned = fields.config.get("no_rope_layers")  # in which 1 stands for a layer with them
    if turned is None:
        interval = fields.size("no_rope_layer_interval", 4)
        turned = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(turned, list) or len(turned) != num_layers or any(flag not in (0, 1) for flag in turned):
        raise fields.refused("no_rope_layers", f"must hold {num_layers} times 0 or 1", "it is one number a layer")
    return tuple(layer for layer, flag in enumerate(turned) if not flag)


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
    kind = _kind(config)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        both["max_position_embeddings"] = scaling.original_length  # from there on the frequencies change
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
        "rope_scaling": scaling and _scaling_fields(scaling),
        **_own_length(scaling),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _kind(config: ModelConfig) -> dict[str, Any]:
    """The model_type that has the model's layers, and the fields that only this type has.

    Raises:
        CheckpointError: no type has them.
    """
    window, bias = config.sliding_window, config.attention_bias
    out_bias = bias if config.attention_out_bias is None else config.attention_out_bias
    own: dict[str, Any]
    has_head_norm = config.qk_norm == "per_head"
    if config.norm_placement == "post" or config.qk_norm == "all_heads":
        name, own = "olmo2", {"attention_bias": bias, "pad_token_id": None}
        is_there = config.norm_placement == "post" and config.qk_norm == "all_heads" and out_bias == bias
        is_there = is_there and window is None and not config.rope_free_layers
    elif has_head_norm or config.rope_free_layers:
        name, is_there = ("qwen3", not config.rope_free_layers) if has_head_norm else ("smollm3", window is None)
        own = {"attention_bias": bias, "use_sliding_window": window is not None, "sliding_window": window}
        is_there = is_there and out_bias == bias
        if name == "qwen3":
            own["max_window_layers"] = 0 if window is not None else config.num_layers
        else:
            turned = [int(layer not in config.rope_free_layers) for layer in range(config.num_layers)]
            own |= {"no_rope_layers": turned, "pad_token_id": None}
    elif bias and not out_bias:
        own = {"use_sliding_window": window is not None, "sliding_window": window}
        own["max_window_layers"] = 0 if window is not None else config.num_layers
        name, is_there = "qwen2", True
    elif bias == out_bias and not (bias and window is not None):
        # A Llama must divide its width among the heads, a Mistral need not.
        is_mistral = window is not None or (config.dim % config.num_heads and not bias)
        name = "mistral" if is_mistral else "llama"
        own = {"sliding_window": window} if is_mistral else {"attention_bias": bias}
        is_there = is_mistral or config.dim % config.num_heads == 0
    else:
        name, own, is_there = "", {}, False
    if not is_there:
        raise CheckpointError(
            f"no model of transformers has attention_bias={bias}, attention_out_bias={out_bias}, qk_norm="
            f"{config.qk_norm}, norm_placement={config.norm_placement}, sliding_window={window}, rope_free_layers="
            f"{list(config.rope_free_layers)} and num_heads={config.num_heads} of dim={config.dim} together, so "
            "there is no folder to write"
        )
    return {"architectures": [_CLASSES[name]], "model_type": name, **own}


_SHARED_FIELDS = ("factor", "low_freq_factor", "high_freq_factor")
_YARN_FIELDS = ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")


def _own_length(scaling: RopeScalingConfig | None) -> dict[str, Any]:
    # transformers 4 looks for longrope's outside of rope_scaling.
    if scaling is None or scaling.kind != "longrope":
        return {}
    return {"original_max_position_embeddings": scaling.original_length}


def _scaling_fields(scaling: RopeScalingConfig) -> dict[str, Any]:
    length = {"original_max_position_embeddings": scaling.original_length}
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
            fields = {name: getattr(scaling, name) for name in _SHARED_FIELDS} | length
    return {"rope_type": scaling.kind, **{name: value for name, value in fields.items() if value is not None}}


def _rope(fields: "_Fields", absent: dict[str, Any]) -> tuple[float, RopeScalingConfig | None]:
    """Base and scaling of the rotary frequencies: rope_theta and rope_scaling, or rope_parameters with both in it."""
    config, place = fields.config, fields.place
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise fields.refused(name, "must be an object or null", "it names the kind of scaling and its numbers")
    inner = _Fields(rope, f"{place}: {name}")
    theta = inner.number("rope_theta", fields.number("rope_theta", absent.get("rope_theta", 10000.0)))
    if rope.get("partial_rotary_factor") not in (1, None):
        raise inner.refused("partial_rotary_factor", "must be 1", "rotary positions turn whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, dict) for value in rope.values()):
        return theta, None
    known: RopeScalingKind | None = next((name for name in ROPE_SCALING_KINDS if name == kind), None)
    if known is None:
        kinds = ", ".join(ROPE_SCALING_KINDS)
        raise CheckpointError(
            f"{place}: {name}={json.dumps(rope)} must be null or of rope_type default, {kinds}; other ways of scaling "
            "give other logits at every length, and are not there"
        )
    try:
        return theta, RopeScalingConfig(kind=known, **_scaling_settings(known, inner, fields, absent))
    except ValueError as error:
        raise CheckpointError(f"{place}: {name}: {error}") from error


def _scaling_settings(kind: str, inner: "_Fields", fields: "_Fields", absent: dict[str, Any]) -> dict[str, Any]:
    """The settings of a way of scaling, with what transformers takes for those that are not there."""
    longest = fields.size("max_position_embeddings", absent["max_position_embeddings"])
    if kind == "linear":
        return {"factor": inner.number("factor")}
    if kind == "dynamic":
        return {"factor": inner.number("factor"), "original_length": longest}
    name = "original_max_position_embeddings"
    if kind == "llama3":
        found = {name: inner.number(name) for name in _SHARED_FIELDS}
        return {**found, "original_length": inner.size(name)}
    # Some models say it outside of rope_scaling, which then counts.
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
        model = from_saved(ModelConfig, settings)
    except ValueError as error:
        raise CheckpointError(f"{place}: model: {error}") from error
    if not has_own_format(model):
        raise CheckpointError(
            f"{place}: model.memory=null must hold memory layers, or model.experts experts, where model_type is "
            f"{MEMORY_MODEL}"
        )
    return model


@dataclasses.dataclass(frozen=True, slots=True)
class _Fields:
    """Reads fields of a config strictly: a size is a whole number, and true is none."""

    config: dict[str, Any]
    place: str

    def refused(self, name: str, rule: str, why: str) -> CheckpointError:
        """What to raise for a field that cannot be honoured."""
        value = json.dumps(self.config.get(name))
        value = value if len(value) <= _LETTERS else f"{value[:_LETTERS]}..."
        return CheckpointError(f"{self.place}: {name}={value} {rule}: {why}")

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

    def optional_number(self, name: str) -> float | None:
        """A positive number, or null; 0 is null, as transformers takes it."""
        return self.number(name) if self.config.get(name) else None

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self.config.get(name)
        if not isinstance(value, list) or any(type(number) not in (int, float) for number in value):
            raise self.refused(name, "must be a list of numbers", "there is one for each pair of a head")
        return tuple(map(float, value))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, "must be true or false", "it decides which weights there are")
        return value
