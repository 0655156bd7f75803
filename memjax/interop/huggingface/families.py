"""The model types of transformers whose layers this decoder has, and memjax's own type for all other models."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memjax.config.model import ModelConfig, QKNorm

MEMORY_MODEL = "memjax"
"""The model_type of models that transformers does not have: decoders with memory layers or experts."""
MEMORY_FORMAT = 2
"""Version of such a model's config; increased when older code could not read it."""
MEMORY_CODE = {
    "AutoConfig": "configuration_memjax.MemjaxConfig",
    "AutoModel": "modeling_memjax.MemjaxModel",
    "AutoModelForCausalLM": "modeling_memjax.MemjaxForCausalLM",
}
"""Classes that run such a model in transformers, in the files next to its config."""


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """A model_type."""

    architecture: str
    absent: Mapping[str, Any]
    """Values of absent fields; null for those not listed."""
    has_bias_flag: bool = True
    """Whether the config has a flag for the attention's biases."""
    qk_norm: QKNorm = "none"


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_SMOLLM = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": Family("MistralForCausalLM", _MISTRAL, has_bias_flag=False),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, has_bias_flag=False),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, qk_norm="per_head"),
    "smollm3": Family("SmolLM3ForCausalLM", _SMOLLM),
    "olmo2": Family("Olmo2ForCausalLM", {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}, qk_norm="all_heads"),
}
"""By model_type."""


def has_own_format(config: ModelConfig) -> bool:
    """Whether a model is written in memjax's own format, with the code to run it."""
    return bool(config.lookups) or config.experts is not None
