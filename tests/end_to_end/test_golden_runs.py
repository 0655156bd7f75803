"""Runs that an older version left unfinished are loaded and resumed with that version's numbers.

The archives are made by tests/fixtures/make_runs.py. The tolerance is needed as the order of XLA's summations depends
on the processor and the code generator.
"""

import functools
import json
import pathlib
import re
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax
from memjax import train
from memjax.sharding.mesh import make_mesh
from memjax.training import main

RUNS = sorted((pathlib.Path(__file__).parents[1] / "fixtures" / "runs").glob("*.tar.xz"))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("archive", RUNS, ids=[path.name.removesuffix(".tar.xz") for path in RUNS])
def test_an_older_run_loads_and_resumes_with_the_numbers_that_it_had(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    expected = np.load(tmp_path / "expected.npz")
    loaded = memjax.load(tmp_path)
    assert loaded.step == 4
    close(loaded.model(jnp.asarray(expected["tokens"])), expected["logits"])

    assert train.main([str(tmp_path / "config.yaml"), "--run.dir", str(tmp_path)]) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    close([row["train/loss"] for row in rows[4:]], expected["losses"])


def test_there_is_a_run_of_each_kind_and_one_of_every_release():
    names = {path.name.removesuffix(".tar.xz") for path in RUNS}
    assert names >= {"dense", "memory_plus", "peer"}
    changelog = (pathlib.Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    assert names >= {f"memory_plus-{version}" for version in re.findall(r"^## (\d+\.\d+\.\d+)", changelog, re.M)}
