"""The public names exist, and importing the package is cheap."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import memjax

ROOT = pathlib.Path(__file__).parents[1]


def test_every_public_name_is_the_thing_it_names():
    for name in memjax.__all__:
        value = getattr(memjax, name)
        assert getattr(value, "__name__", name) == name or name == "__version__"
        assert name in dir(memjax)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'memjax' has no attribute 'Memory'"):
        _ = memjax.Memory


def test_the_version_is_the_packages():
    assert memjax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, memjax, memjax.evaluate, memjax.generate\n"
        "memjax.RunConfig\n"
        "print({'jax', 'flax', 'orbax', 'grain', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_old_name_raises_with_the_new_one():
    for old, new in (("ExpertLookupLayer", "memjax.PEERLayer"), ("zero_tap", "zero_perturbations")):
        with pytest.raises(AttributeError, match=f"memjax.{old} is now .*{new}"):
            getattr(memjax, old)


NOT_PATHS = """
import sys

import memjax
from memjax.checkpoint import Checkpoints
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.interop.huggingface.convert import from_hf, to_hf
from memjax.runs.patches import edit
from memjax.runs.patches.patch import patch_file, read_patch
from memjax.runs.quantize import quantize_run

MEMORY = memjax.MemoryConfig()
FUNCTIONS = [
    memjax.load,
    memjax.fit,
    lambda path: memjax.from_official(path, "out"),
    lambda path: memjax.from_official("model", path),
    lambda path: memjax.upcycle_run(path, "out", MEMORY),
    lambda path: memjax.upcycle_run("run", path, MEMORY),
    memjax.Tokenizer.load,
    ByteTokenizer().save,
    Checkpoints,
    lambda path: from_hf(path, "out"),
    lambda path: from_hf("model", path),
    lambda path: from_hf(sys.argv[1], "out", tokenizer=path),
    lambda path: to_hf(path, "out"),
    lambda path: to_hf("run", path),
    lambda path: to_hf("run", "out", like=path),
    lambda path: quantize_run(path, "out", None),
    lambda path: quantize_run("run", path, None),
    patch_file,
    read_patch,
    lambda path: edit.diff(path, path),
    lambda path: edit.apply("run", path),
    lambda path: edit.revert(path, "patch"),
]
for number, function in enumerate(FUNCTIONS):
    for path in (b"run", 5, 2.5, ["run"], "", "a\\0b", "gs:/bucket"):
        try:
            function(path)
        except Exception as error:
            print(number, repr(path), type(error).__name__, "|", str(error).replace("\\0", "NUL"))
        else:
            print(number, repr(path), "no error")
"""


def test_whatever_is_no_path_is_refused_by_every_function_that_takes_one(tmp_path):
    # In a process of its own: here, the types of all arguments are checked before a function sees them.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", NOT_PATHS, str(ROOT / "tests/fixtures/llama/llama2")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 22 * 7
    told = r"\w+=.* must be (the path of a file|a path on this machine)"
    refused = re.compile(rf"\d+ .+ (Config|Data|Checkpoint)Error \| (command line: )?{told}")
    for line in lines:
        assert refused.match(line), line
