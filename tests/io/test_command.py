"""Set-up and clean-up that all commands share."""

import os

import pytest

from memjax.io.command import exit_code, explain


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, None),
        ({"JAX_NUM_CPU_DEVICES": "1"}, None),
        ({"JAX_NUM_CPU_DEVICES": "many"}, None),
        ({"JAX_NUM_CPU_DEVICES": "8"}, 32),
        ({"XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=8"}, 32),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "9"}, 9),
    ],
)
def test_devices_that_a_cpu_simulates_get_threads_to_wait_in(variables, threads, monkeypatch):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = []
    assert exit_code(lambda: found.append(os.environ.get("NPROC"))) == 0
    assert found == [threads and str(threads)]


def test_a_removed_current_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        os.path.abspath("runs/a")
    assert explain(caught.value) == "the current folder no longer exists; change to another"
    with pytest.raises(FileNotFoundError) as caught:
        os.stat("runs/a")
    assert explain(caught.value) == "runs/a: No such file or directory"
