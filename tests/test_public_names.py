"""The public names exist, and importing the package is cheap."""

import pathlib
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
