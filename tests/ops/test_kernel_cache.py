"""Compiled kernels are reused by later processes, and damaged ones only cost a compilation."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import types
import zlib

import jax
import pytest

from memjax.io import compilation_cache
from memjax.ops.kernel_cache import keep_kernels

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Compiled:
    binary: str
    name: str
    shared_mem_bytes: int
    ttgir: str | None = None
    llir: str | None = None


@pytest.fixture
def folder(tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def process():
    """jax-triton's compiler as in a new process, and the list of what it compiles."""
    compiled = []

    def compile_(module, backend, options, compute_capability, platform):
        compiled.append(module)
        return Compiled(f"code of {module} {options} {compute_capability} {platform}", "kernel", 48)

    lib = types.SimpleNamespace(compile_ttir_inplace=compile_, CompilationResult=Compiled)
    keep_kernels(lib)
    return lib.compile_ttir_inplace, compiled


def test_another_process_compiles_only_what_is_new(folder):
    calls = [
        (m, None, options, cc, "cuda") for m in ("a", "b") for options in ("warps 4", "warps 8") for cc in (80, 90)
    ]
    first, compiled = process()
    found = [first(*call) for call in calls]
    assert len(compiled) == len(calls)
    second, compiled = process()
    assert [second(*call) for call in calls] == found
    assert compiled == []
    second("c", None, "warps 4", 90, "cuda")
    assert compiled == ["c"]
    assert len(os.listdir(folder)) == len(calls) + 1


@pytest.mark.parametrize(
    "content", [b"", b"no entry", zlib.compress(b"[1"), zlib.compress(b"[1]"), zlib.compress(b"{}")]
)
def test_a_damaged_entry_is_compiled_again_and_replaced(folder, content):
    call = ("a", None, "warps 4", 90, "cuda")
    wanted = process()[0](*call)
    (path,) = folder.iterdir()
    path.write_bytes(content)
    for times in (1, 0):
        again, compiled = process()
        assert again(*call) == wanted
        assert len(compiled) == times


def test_a_kernel_cut_off_while_it_was_written_is_removed_like_a_program(folder):
    process()[0]("a", None, "warps 4", 90, "cuda")
    (path,) = folder.iterdir()
    compilation_cache._tidy(folder)
    assert path.exists()
    (folder / "checked.json").unlink()
    path.write_bytes(path.read_bytes()[:-5])
    os.utime(path, (0, 0))  # old enough not to look like one that another process is writing
    compilation_cache._tidy(folder)
    assert not path.exists()


@pytest.mark.parametrize("kept", [None, "a folder that is not there", "gs://bucket/cache"])
def test_without_a_folder_kernels_are_compiled_as_before(folder, kept):
    jax.config.update("jax_compilation_cache_dir", kept)
    for _ in range(2):
        compiler, compiled = process()
        assert compiler("a", None, "warps 4", 90, "cuda").name == "kernel"
        assert compiled == ["a"]


def test_other_versions_of_jax_triton_cost_only_the_cache(folder, monkeypatch):
    keep_kernels(types.SimpleNamespace())
    monkeypatch.delattr("triton._C.libtriton.get_cache_invalidating_env_vars")
    results = Compiled(b"code", "kernel", 48), types.SimpleNamespace(name="kernel")  # pyright: ignore
    for number, result in enumerate(results):
        lib = types.SimpleNamespace(compile_ttir_inplace=lambda *_, number, result=result, **__: result)
        keep_kernels(lib)
        for _ in range(2):
            assert lib.compile_ttir_inplace("a", None, "more", number=number) is result
    assert os.listdir(folder) == []


def test_dumping_compiled_code_disables_the_cache(folder, monkeypatch):
    monkeypatch.setenv("JAX_TRITON_DUMP_DIR", str(folder / "dump"))
    for _ in range(2):
        compiler, compiled = process()
        compiler("a", None, "warps 4", 90, "cuda")
        assert compiled == ["a"]


PROGRAM = """
import jax, jax.numpy as jnp
import jax_triton.triton_lib as lib
from memjax.ops import triton_call
from memjax.ops.embedding_bag import triton as bag
compiled, compiler = [], lib.compile_ttir_to_ptx_inplace
lib.compile_ttir_to_ptx_inplace = lambda *arguments: compiled.append(1) or compiler(*arguments)
triton_call.compute_capability = 90
array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
arguments = array(jnp.float32, 1000, 48), array(jnp.int32, 8, 128), array(jnp.float32, 8, 128)
text = jax.jit(bag.embedding_bag).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
print(len(compiled), hash(text))
"""


@pytest.mark.slow
def test_a_second_process_gets_the_program_of_the_first_without_compiling_a_kernel(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}
    run = lambda: subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    first = run()
    if "jax_triton" in first.stderr.rpartition("Error")[2]:
        pytest.skip("jax_triton cannot be imported")
    (times, text), (again, same) = first.stdout.split(), run().stdout.split()
    assert int(times) > 0
    assert (int(again), same) == (0, text)
