"""Memory layers for language models in JAX: trainable key-value lookup in place of feed-forward layers.

Names are imported when they are first used, so that `import memjax` is quick and sets up no backend.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memjax.config import ExpertLookupConfig, ExpertsConfig, MemoryConfig, ModelConfig, RunConfig, SamplingConfig
    from memjax.data.tokenizer import Tokenizer
    from memjax.inference.engine import Engine, Request
    from memjax.inference.text import Continuation, continue_texts, stream_text
    from memjax.interop.official import from_official
    from memjax.interop.upcycle import upcycle, upcycle_run
    from memjax.loading import load
    from memjax.memory.expert_lookup import ExpertLookupLayer
    from memjax.memory.keys import Lookup
    from memjax.memory.layer import MemoryLayer
    from memjax.memory.parallel import zero_tap
    from memjax.memory.sparse_gradient import row_sparse_value_and_grad
    from memjax.memory.table import TableRows, ValueTable
    from memjax.models.decoder import Decoder
    from memjax.ops.embedding_bag.api import embedding_bag
    from memjax.ops.embedding_dot.api import embedding_dot
    from memjax.ops.grouped_matmul.api import grouped_matmul
    from memjax.ops.product_key_search.api import product_key_search
    from memjax.ops.row_gradient import RowGradient
    from memjax.ops.row_update.api import row_update
    from memjax.ops.row_update.rules import RowRule, row_step

__version__ = "0.1.0"

__all__ = [
    "Continuation",
    "Decoder",
    "Engine",
    "ExpertLookupConfig",
    "ExpertLookupLayer",
    "ExpertsConfig",
    "Lookup",
    "MemoryConfig",
    "MemoryLayer",
    "ModelConfig",
    "Request",
    "RowGradient",
    "RowRule",
    "RunConfig",
    "SamplingConfig",
    "TableRows",
    "Tokenizer",
    "ValueTable",
    "__version__",
    "continue_texts",
    "embedding_bag",
    "embedding_dot",
    "from_official",
    "grouped_matmul",
    "load",
    "product_key_search",
    "row_sparse_value_and_grad",
    "row_step",
    "row_update",
    "stream_text",
    "upcycle",
    "upcycle_run",
    "zero_tap",
]

_MODULES = {
    "Continuation": "inference.text",
    "Decoder": "models.decoder",
    "Engine": "inference.engine",
    "ExpertLookupConfig": "config",
    "ExpertLookupLayer": "memory.expert_lookup",
    "ExpertsConfig": "config",
    "Lookup": "memory.keys",
    "MemoryConfig": "config",
    "MemoryLayer": "memory.layer",
    "ModelConfig": "config",
    "Request": "inference.engine",
    "RowGradient": "ops.row_gradient",
    "RowRule": "ops.row_update.rules",
    "RunConfig": "config",
    "SamplingConfig": "config",
    "TableRows": "memory.table",
    "Tokenizer": "data.tokenizer",
    "ValueTable": "memory.table",
    "continue_texts": "inference.text",
    "embedding_bag": "ops.embedding_bag.api",
    "embedding_dot": "ops.embedding_dot.api",
    "from_official": "interop.official",
    "grouped_matmul": "ops.grouped_matmul.api",
    "load": "loading",
    "product_key_search": "ops.product_key_search.api",
    "row_sparse_value_and_grad": "memory.sparse_gradient",
    "row_step": "ops.row_update.rules",
    "row_update": "ops.row_update.api",
    "stream_text": "inference.text",
    "upcycle": "interop.upcycle",
    "upcycle_run": "interop.upcycle",
    "zero_tap": "memory.parallel",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'memjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"memjax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
