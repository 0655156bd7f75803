"""The cache of compiled programs: its location, what is kept out of it, and that damage only costs a compilation."""

import json
import os
import pathlib
import subprocess
import sys
import time
import zlib

import pytest

from memjax.io import compilation_cache

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from memjax.io import compilation_cache
folder = compilation_cache.enable()
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
print(float(jax.jit(lambda x: jnp.sin(x) + 1)(0.0)), events.count("cache_hits"), events.count("cache_misses"), folder)
"""


def run(**env: str) -> list[str]:
    """Runs PROGRAM in a new process, and returns its output: value, hits, misses and folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "MEMJAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_damage_is_compiled_again(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    value, hits, misses, name = run(**cache)
    folder = pathlib.Path(name)
    assert (value, hits, int(misses) > 0) == ("1.0", "0", True)
    assert folder.parent == tmp_path / "memjax" / "compiled"
    assert folder.stat().st_mode & 0o77 == 0
    assert run(**cache)[:3] == ["1.0", misses, "0"]
    (path,) = folder.glob("*-cache")
    # This damage shows by the checksum; a truncated entry is noticed without one.
    path.write_bytes(zlib.compress(b"a program of another machine"))
    assert run(**cache)[:3] == ["1.0", "0", misses]
    path.write_bytes(path.read_bytes()[:-9])
    (folder / "checked.json").write_text("[[[")
    assert run(**cache)[:2] == ["1.0", "0"]
    os.utime(path, (0, 0))  # old enough not to look like one that another process is writing
    compilation_cache._tidy(folder)
    assert list(folder.glob("*-cache")) == []


@pytest.mark.parametrize("env", [{"MEMJAX_COMPILE_CACHE": "off"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}])
def test_one_variable_turns_it_off(tmp_path, env):
    assert run(XDG_CACHE_HOME=str(tmp_path), **env)[1:] == ["0", "0", "None"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_turns_it_off(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MEMJAX_COMPILE_CACHE")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # set by the suite
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation_cache.enable() is None
    assert capsys.readouterr().err == ""
    assert compilation_cache.enable(str(tmp_path / "file")) is None
    assert capsys.readouterr().err == f"compiled programs are not kept: {tmp_path / 'file'}: Not a directory\n"
    assert compilation_cache.enable(None) is None


def test_machines_with_other_instruction_sets_have_their_own_folders(monkeypatch):
    def cpu(flags):
        lines = f"processor : 0\ncpu MHz : {time.time()}\nmodel name : X\nflags : {flags}\n"
        monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: lines)
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0.10.2")
        return compilation_cache._machine()

    assert cpu("sse avx2") == cpu("sse avx2") != cpu("sse avx2 avx512f")
    assert cpu("sse").startswith("jaxlib-0.10.2-")


def test_the_oldest_entries_are_removed_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 250)
    for age, name in enumerate(["new", "used", "old", "oldest"]):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(zlib.compress(os.urandom(100 - 11)))
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "used-cache", (2e9, 1e9))
    compilation_cache._tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["new-cache", "used-cache"]
    assert sorted(json.loads((tmp_path / "checked.json").read_text())) == ["new-cache", "used-cache"]
