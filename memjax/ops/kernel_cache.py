"""Compiled Triton kernels in the folder of JAX's persistent compilation cache.

jax-triton compiles kernels anew in every process: JAX looks up the whole program in its cache only after that.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import zlib
from typing import Any

import jax

from memjax.io.compilation_cache import KERNEL_SUFFIX
from memjax.io.files import write_atomic


def keep_kernels(lib: Any) -> None:
    """Patches `lib`, the module `jax_triton.triton_lib`, to compile only kernels that the cache lacks."""
    if "JAX_TRITON_DUMP_DIR" in os.environ:  # dumping needs a compilation
        return
    compiler = lib.compile_ttir_inplace
    settings = importlib.import_module("triton._C.libtriton").get_cache_invalidating_env_vars()
    version = f"{importlib.import_module('triton').__version__} {settings}"

    @functools.wraps(compiler)
    def look_up(module: Any, backend: Any, options: Any, compute_capability: int, platform: str) -> Any:
        compile_ = functools.partial(compiler, module, backend, options, compute_capability, platform)
        folder = jax.config.values["jax_compilation_cache_dir"]
        if not folder or not jax.config.values["jax_enable_compilation_cache"] or not os.path.isdir(folder):
            return compile_()
        # Computed before the compilation, which modifies the module.
        key = "\n".join([str(module), repr(options), str(compute_capability), platform, version])
        path = pathlib.Path(folder) / f"triton-{hashlib.sha256(key.encode()).hexdigest()}{KERNEL_SUFFIX}"
        with contextlib.suppress(OSError, ValueError, TypeError, zlib.error):  # it is missing or damaged
            return lib.CompilationResult(**json.loads(zlib.decompress(path.read_bytes())))
        compiled = compile_()
        with contextlib.suppress(OSError):
            write_atomic(path, zlib.compress(json.dumps(dataclasses.asdict(compiled)).encode()))
        return compiled

    lib.compile_ttir_inplace = look_up
