"""Sections check the types and ranges of their fields; settings are replaced by dotted name."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
import pytest

from memjax.config.data import DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig, RunFolderConfig
from memjax.config.section import BelowOne, Positive, Section, replaced


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Toy(Section):
    size: Positive[int] = 1
    share: BelowOne[float] | None = None

    def problems(self):
        if self.share is not None and self.size > 1:
            yield f"share={self.share} is for size=1"


def test_types_come_first_then_all_ranges_and_rules(as_users_call):
    assert Toy(size=2).share is None
    with pytest.raises(ValueError, match=r"^size=None must be a whole number$"):
        Toy(size=None, share=2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^size=0 must be positive\nshare=1\.0 must be in 0\.\.1 and below 1$"):
        Toy(size=0, share=1.0)
    with pytest.raises(ValueError, match=r"^share=0\.5 is for size=1$"):
        Toy(size=2, share=0.5)


def test_numbers_of_numpy_are_kept_as_numbers_of_python(as_users_call):
    sizes: Any = {"size": np.int64(1), "share": np.float32(0.5)}
    settings: Any = {"layers": (np.int32(3),), "qk_norm": np.bool_(True)}
    toy, memory = Toy(**sizes), MemoryConfig(**settings)
    kept = (toy.size, toy.share, *memory.layers, memory.qk_norm)
    assert kept == (1, 0.5, 3, True)
    assert list(map(type, kept)) == [int, float, int, bool]
    with pytest.raises(ValueError, match=r"^size=1\.0 must be a whole number$"):
        Toy(size=np.float64(1))  # pyright: ignore[reportArgumentType]


def test_paths_are_kept_as_texts(as_users_call):
    folder: Any = {"dir": pathlib.Path("~/a b")}
    found: Any = {"path": pathlib.Path("c.jsonl"), "source": "jsonl"}
    kept = (RunFolderConfig(**folder).dir, DataConfig(**found).path)
    assert kept == (os.path.expanduser("~/a b"), "c.jsonl")
    assert list(map(type, kept)) == [str, str]
    with pytest.raises(ValueError, match=r"^size='a' must be a whole number$"):
        Toy(size=pathlib.Path("a"))  # pyright: ignore[reportArgumentType]


def test_a_section_must_have_its_class(as_users_call):
    fields: Any = {"memory": {"num_keys": 8}}
    with pytest.raises(ValueError, match=r"^memory=\{'num_keys': 8\} must be of class MemoryConfig$"):
        ModelConfig(**fields)
    parts: Any = {"source": "mixture", "mixture": ({"name": "a", "path": "b"},)}
    with pytest.raises(
        ValueError, match=r"^mixture=\(\{'name': 'a', 'path': 'b'\},\) must be a tuple of MixtureConfig$"
    ):
        DataConfig(**parts)


def test_settings_that_are_right_only_together_are_replaced_at_once():
    changed = replaced(
        RunConfig(), {"data.batch_size": 6, "train.grad_accum_steps": 3, "model.memory.layers": (0,), "model.dim": 32}
    )
    assert (changed.data.batch_size, changed.train.grad_accum_steps, changed.model.dim) == (6, 3, 32)
    assert changed.model.memory == MemoryConfig(layers=(0,))
    with pytest.raises(ValueError, match="must be a multiple"):
        replaced(RunConfig(), {"train.grad_accum_steps": 3})
