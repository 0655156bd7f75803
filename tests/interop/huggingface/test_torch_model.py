"""The torch code of exported folders, checked as far as possible without torch; experiments/references runs it."""

import ast
import dataclasses
import re
from collections.abc import Iterator

import pytest

from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ExpertsConfig, ModelConfig, RopeScalingConfig
from memjax.interop.huggingface.convert import TORCH_MODEL
from memjax.interop.huggingface.tensors import _tensors
from memjax.interop.huggingface.written_config import write_model_config
from memjax.models.parts import DecoderParts
from memjax.runs.layout import params_to_tree

FILES = ("configuration_memjax.py", "modeling_memjax.py")
TREES = {name: ast.parse((TORCH_MODEL / name).read_text(encoding="utf-8")) for name in FILES}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
PLACED_MEMORY = MemoryConfig(layers=(0,), placement="parallel", output_gate=True, value_dim=32)
EVERYTHING = ModelConfig(
    num_layers=3,
    memory=PLACED_MEMORY,
    peer=PEERConfig(layers=(1,)),
    experts=ExpertsConfig(layers=(2,), num_experts=2),
    attention_bias=True,
    qk_norm="per_head",
)


def exported_names(config: ModelConfig) -> set[str]:
    """The names of a model's tensors in files, with * for a block's index or a table's name."""
    parts = DecoderParts.of(config)
    tensors = _tensors(params_to_tree(parts.abstract_params), parts.abstract_tables, config).values()
    return {re.sub(r"(layers|tables)\.\w+\.", r"\1.*.", tensor.name) for tensor in tensors}


def declared_names(class_name: str) -> Iterator[str]:
    """Yields the names of a class's parameters, by its assignments to self."""
    (init,) = (node for node in CLASSES[class_name].body if getattr(node, "name", None) == "__init__")
    for node in ast.walk(init):
        if isinstance(node, ast.Assign):
            targets = [part for target in node.targets for part in getattr(target, "elts", [target])]
            called = {ast.unparse(call.func) for call in ast.walk(node.value) if isinstance(call, ast.Call)}
            for name in (part.attr for part in targets if isinstance(part, ast.Attribute)):
                yield from (f"{name}{ending}" for ending in _endings(called))


def _endings(called: set[str]) -> Iterator[str]:
    inside = "." if "nn.ModuleList" not in called else ".*."
    if "nn.Parameter" in called:
        yield ""
    if called & {"nn.Linear", "nn.Embedding"}:
        yield ".weight"
        yield ".bias"
    if "tables_of" in called:
        yield from (f".*.{name}" for name in declared_names("MemjaxTable"))
    for inner in called & CLASSES.keys():
        yield from (f"{inside}{name}" for name in declared_names(inner))


WITHOUT_BIAS = r"(embed_tokens|lm_head|mlp\.\w+|router)\.bias"


def test_the_torch_code_declares_the_parameters_that_are_exported():
    declared = {name for name in declared_names("MemjaxForCausalLM") if not re.search(WITHOUT_BIAS, name)}
    post = dataclasses.replace(EVERYTHING, norm_placement="post", qk_norm="all_heads")
    assert exported_names(EVERYTHING) | exported_names(post) == declared


def test_no_layer_takes_the_number_of_tokens_as_a_constant():
    # torch.export would specialise the program to that number; only parameter sizes may be constants.
    forwards = [part for node in CLASSES.values() for part in node.body if getattr(part, "name", None) == "forward"]
    assert len(forwards) > 8
    calls = [ast.unparse(call) for forward in forwards for call in ast.walk(forward) if isinstance(call, ast.Call)]
    assert {call for call in calls if call.startswith(("len(", "int("))} <= {"len(self.gate)"}


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(memory=MemoryConfig(shared_table=False)),
        ModelConfig(memory=MemoryConfig(gate="none"), tie_embeddings=True),
        ModelConfig(memory=None, peer=PEERConfig(shared_table=False)),
    ],
    ids=["own tables", "no gate", "peer"],
)
def test_other_models_have_some_of_these_parameters(config):
    assert exported_names(config) < set(declared_names("MemjaxForCausalLM"))


def test_every_setting_that_the_torch_code_reads_exists():
    sections = (ModelConfig, MemoryConfig, PEERConfig, ExpertsConfig, RopeScalingConfig)
    known = {field.name for section in sections for field in dataclasses.fields(section)}
    read = {
        node.slice.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
        and ast.unparse(node.value) not in ("kwargs", "content")
    }
    assert {"dim", "placement", "qk_norm", "original_length", "renormalize"} < read
    assert read <= known


def test_the_config_names_the_classes_of_the_files():
    fields = write_model_config(EVERYTHING, dtype="float32", longest=64, bos=1, eos=[2])
    assert fields["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for name in fields["auto_map"].values():
        module, class_name = name.split(".")
        assert class_name in [getattr(node, "name", None) for node in TREES[f"{module}.py"].body]
    assert fields["architectures"] == [fields["auto_map"]["AutoModelForCausalLM"].split(".")[1]]
    assert fields["table_device"] == "cuda"


def test_the_code_needs_nothing_but_torch_and_transformers():
    imported = {
        ((isinstance(node, ast.ImportFrom) and node.module) or alias.name).split(".")[0]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"inspect", "math", "torch", "transformers", "configuration_memjax"}
