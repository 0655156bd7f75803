"""Compiled Triton kernels in the folder of JAX's persistent compilation cache.

Without it, every process would compile all kernels again: JAX looks up a program in its cache only after jax-triton has
compiled the program's kernels.
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
    compiler = getattr(lib, "compile_ttir_inplace", None)
    if compiler is None or "JAX_TRITON_DUMP_DIR" in os.environ:  # another version; dumping needs a compilation
        return
    settings = getattr(importlib.import_module("triton._C.libtriton"), "get_cache_invalidating_env_vars", dict)()
    version = f"{importlib.import_module('triton').__version__} {settings}"

    @functools.wraps(compiler)
    def look_up(module: Any, backend: Any, *others: Any, **named: Any) -> Any:
        compile_ = functools.partial(compiler, module, backend, *others, **named)
        folder = jax.config.values["jax_compilation_cache_dir"]
        if not folder or not jax.config.values["jax_enable_compilation_cache"] or not os.path.isdir(folder):
            return compile_()
        # Computed before the compilation, which modifies the module.
        key = "\n".join([str(module), repr(others), repr(named), version])
        path = pathlib.Path(folder) / f"triton-{hashlib.sha256(key.encode()).hexdigest()}{KERNEL_SUFFIX}"
        # The entry is missing or damaged, or this version of jax-triton lacks the type.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, zlib.error):
            return lib.CompilationResult(**json.loads(zlib.decompress(path.read_bytes())))
        compiled = compile_()
        with contextlib.suppress(OSError, TypeError):  # a result of another type is not kept
            write_atomic(path, zlib.compress(json.dumps(dataclasses.asdict(compiled)).encode()))
        return compiled

    lib.compile_ttir_inplace = look_up
