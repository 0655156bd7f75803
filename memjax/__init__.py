"""Memory layers for language models in JAX: trainable key-value lookup in place of feed-forward layers.

Names are imported when first used, so that `import memjax` is quick and initialises no backend.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memjax.config.memory import MemoryConfig as MemoryConfig
    from memjax.config.memory import PEERConfig as PEERConfig
    from memjax.config.model import ExpertsConfig as ExpertsConfig
    from memjax.config.model import ModelConfig as ModelConfig
    from memjax.config.run import RunConfig as RunConfig
    from memjax.config.sampling import SamplingConfig as SamplingConfig
    from memjax.data.tokenizers.base import Tokenizer as Tokenizer
    from memjax.evaluation.perplexity import bits_per_byte as bits_per_byte
    from memjax.evaluation.recall import fact_report as fact_report
    from memjax.inference.engine import Engine as Engine
    from memjax.inference.requests import Request as Request
    from memjax.inference.text import Continuation as Continuation
    from memjax.inference.text import continue_texts as continue_texts
    from memjax.inference.text import stream_text as stream_text
    from memjax.interop.official.convert import from_official as from_official
    from memjax.interop.upcycle import upcycle as upcycle
    from memjax.interop.upcycle import upcycle_run as upcycle_run
    from memjax.memory.keys import Lookup as Lookup
    from memjax.memory.layer import MemoryLayer as MemoryLayer
    from memjax.memory.nnx_training import Gradients as Gradients
    from memjax.memory.nnx_training import Optimizer as Optimizer
    from memjax.memory.nnx_training import value_and_grad as value_and_grad
    from memjax.memory.peer import PEERLayer as PEERLayer
    from memjax.memory.read import TableRead as TableRead
    from memjax.memory.row_optimizer import RowOptimizer as RowOptimizer
    from memjax.memory.sparse_gradient import row_sparse_value_and_grad as row_sparse_value_and_grad
    from memjax.memory.table import TableRows as TableRows
    from memjax.memory.table import ValueTable as ValueTable
    from memjax.models.decoder import Decoder as Decoder
    from memjax.ops.embedding_bag.api import embedding_bag as embedding_bag
    from memjax.ops.embedding_dot.api import embedding_dot as embedding_dot
    from memjax.ops.grouped_matmul.api import grouped_matmul as grouped_matmul
    from memjax.ops.product_key_search.api import product_key_search as product_key_search
    from memjax.ops.row_gradient import RowGradient as RowGradient
    from memjax.ops.row_update.api import row_update as row_update
    from memjax.ops.row_update.rules import RowRule as RowRule
    from memjax.ops.row_update.rules import row_step as row_step
    from memjax.runs.load import load as load
    from memjax.training.fit import fit as fit
    from memjax.training.hook import Hook as Hook
    from memjax.training.hook import Periodic as Periodic

__version__ = "0.1.0"

_MODULES = {
    "Continuation": "inference.text",
    "Decoder": "models.decoder",
    "Engine": "inference.engine",
    "ExpertsConfig": "config.model",
    "Gradients": "memory.nnx_training",
    "Hook": "training.hook",
    "Lookup": "memory.keys",
    "MemoryConfig": "config.memory",
    "MemoryLayer": "memory.layer",
    "ModelConfig": "config.model",
    "Optimizer": "memory.nnx_training",
    "PEERConfig": "config.memory",
    "PEERLayer": "memory.peer",
    "Periodic": "training.hook",
    "Request": "inference.requests",
    "RowGradient": "ops.row_gradient",
    "RowOptimizer": "memory.row_optimizer",
    "RowRule": "ops.row_update.rules",
    "RunConfig": "config.run",
    "SamplingConfig": "config.sampling",
    "TableRead": "memory.read",
    "TableRows": "memory.table",
    "Tokenizer": "data.tokenizers.base",
    "ValueTable": "memory.table",
    "bits_per_byte": "evaluation.perplexity",
    "continue_texts": "inference.text",
    "embedding_bag": "ops.embedding_bag.api",
    "embedding_dot": "ops.embedding_dot.api",
    "fact_report": "evaluation.recall",
    "fit": "training.fit",
    "from_official": "interop.official.convert",
    "grouped_matmul": "ops.grouped_matmul.api",
    "load": "runs.load",
    "product_key_search": "ops.product_key_search.api",
    "row_sparse_value_and_grad": "memory.sparse_gradient",
    "row_step": "ops.row_update.rules",
    "row_update": "ops.row_update.api",
    "stream_text": "inference.text",
    "upcycle": "interop.upcycle",
    "upcycle_run": "interop.upcycle",
    "value_and_grad": "memory.nnx_training",
}
"""The public names and their modules."""

_RENAMED = {
    "ExpertLookupConfig": "memjax.PEERConfig",
    "ExpertLookupLayer": "memjax.PEERLayer",
    "zero_tap": "the method zero_perturbations of a layer",
}
"""Names of version 0.1, and their replacements."""

__all__ = ["__version__", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"memjax.{name} is now {_RENAMED[name]}")
    if name not in _MODULES:
        raise AttributeError(f"module 'memjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"memjax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
