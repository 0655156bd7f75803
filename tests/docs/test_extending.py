"""The additions that the page on extending describes work: the files of an operation, the line of a metric."""

import functools
import importlib
import pathlib
import re
import types

import jax
import pytest

from memjax import ops
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.ops import dispatch, specs
from memjax.training import step
from memjax.training.program import TrainProgram

ROOT = pathlib.Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def operation(tmp_path, monkeypatch):
    """Writes the page's operation to a folder that is added to the path of memjax.ops."""
    files = {match[1]: block for block in BLOCKS if (match := re.match(r"# (squared_norms/\w+\.py)\n", block))}
    (tmp_path / "squared_norms").mkdir()
    (tmp_path / "squared_norms" / "__init__.py").touch()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setattr(specs, "OPERATIONS", (*specs.OPERATIONS, "squared_norms"))
    return "squared_norms"


def test_the_operation_of_the_page_is_found_chosen_and_compared(operation):
    assert set(specs.specs(operation)) == {"norms"}
    assert specs.difference(operation, "xla") < 1e-6
    api = importlib.import_module(f"memjax.ops.{operation}.api")
    assert dispatch.choose(operation, None) == "xla"
    assert api.squared_norms(jax.numpy.array([[3.0, 4.0], [0.0, 2.0]])).tolist() == [25, 4]
    with pytest.raises(ValueError, match="x must be"):
        api.squared_norms(jax.numpy.ones(3))


def test_the_metric_of_the_page_is_in_the_row_of_a_step():
    (line,) = [block for block in BLOCKS if block.startswith("    metrics[")]
    source, last = pathlib.Path(step.__file__).read_text(), "    return new_state, metrics\n"
    assert source.count(last) == 1
    extended = types.ModuleType("extended_step")
    exec(compile(source.replace(last, line + last), step.__file__, "exec"), extended.__dict__)
    model = ModelConfig(num_layers=1, memory=MemoryConfig(layers=(0,)))
    program = TrainProgram.of(RunConfig(model=model))
    traced = functools.partial(extended.train_step, program)
    _, metrics = jax.eval_shape(traced, program.abstract_state, step.abstract_batch(program.config))
    assert "train/param_norm" not in source
    assert metrics["train/param_norm"].shape == metrics["train/loss"].shape == ()
