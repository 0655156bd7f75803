"""The only place that launches Triton kernels: through jax-triton on a GPU, or interpreted on the CPU in tests.

jax-triton cannot be imported without a GPU build of JAX, so it is imported at the first launch. With TRITON_INTERPRET=1
in the environment the same kernels run in Triton's interpreter on NumPy arrays: slow, exact, for tests alone.
"""

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.custom_batching import sequential_vmap
from jax.interpreters import mlir
from jaxlib.mlir import ir

from memjax.ops.kernel_cache import keep_kernels
from memjax.ops.manual_axes import vary_like

T = TypeVar("T")

FFI_TARGET, FFI_VERSION = "triton_kernel_call_ffi", 4
"""jaxlib's launcher for XLA's typed foreign function interface."""

compute_capability: int | None = None
"""If set (90 for sm_90), compile for it instead of the device's own: for compile checks without a GPU."""


def why_not() -> str | None:
    """The reason why Triton kernels cannot run here; None if they can."""
    if is_interpreted():
        return _import_problem("triton")
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, found {jax.default_backend()}"
    return _import_problem("jax_triton")


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; decided before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error}); install jax-triton and triton"
    return None


def launch(
    kernel: Any,
    *arguments: jax.Array,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: Sequence[int],
    num_warps: int = 4,
    num_stages: int = 2,
    aliases: dict[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Runs a kernel whose parameters are the arguments, then one pointer for each output, then the constants.

    `aliases` maps the index of an argument to that of the output that takes over its memory.

    Raises:
        TypeError: the kernel does not have one of the constants.
    """
    unknown = set(constants) - set(kernel.arg_names)
    if unknown:
        raise TypeError(f"{kernel.fn.__name__} has no {', '.join(sorted(unknown))}")
    options = {"out_shape": list(out), "grid": tuple(grid), "input_output_aliases": aliases or {}}
    if is_interpreted():
        return vary_like(_interpret(kernel, *arguments, **options, **constants), arguments)
    outputs = _jax_triton().triton_call(
        *arguments,
        kernel=kernel,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=compute_capability,
        **options,
        **constants,
    )
    # Kernels do not track varying manual axes.
    return vary_like(outputs, arguments)


def sequential(function: Callable[..., T]) -> Callable[..., T]:
    """A function of arrays to which `jax.vmap` passes a batch one element at a time; keyword arguments are static."""

    @functools.wraps(function)
    def call(*arrays: Any, **settings: Any) -> T:
        return sequential_vmap(functools.partial(function, **settings))(*arrays)

    return call


@functools.cache
def _jax_triton() -> Any:
    """The jax_triton module, patched to cache compiled kernels and, if necessary, to use jaxlib's newer launcher.

    jax-triton 0.3 emits custom calls of the oldest interface, and XLA ends a CUDA graph at each of those. jaxlib can
    also launch the same kernels through XLA's foreign function interface, whose calls become part of the graph.
    Without that launcher in jaxlib, the old one is used.
    """
    jax_triton, lib = importlib.import_module("jax_triton"), importlib.import_module("jax_triton.triton_lib")
    keep_kernels(lib)
    # None where jaxlib finds no CUDA plugin.
    plugin = importlib.import_module("jaxlib.gpu_triton")._cuda_triton
    if FFI_TARGET in getattr(plugin, "registrations", dict)():
        lower = functools.partial(lib.triton_kernel_call_lowering, lib.get_cuda_backend)
        mlir.register_lowering(lib.triton_kernel_call_p, functools.partial(_lower, lower), platform="cuda")
    return jax_triton


def _lower(lower: Callable[..., Any], context: mlir.LoweringRuleContext, *arguments: Any, **options: Any) -> Any:
    """jax-triton's own lowering, with its custom call converted to the newer interface."""
    results = lower(context, *arguments, **options)
    attributes = results[0].owner.attributes
    if attributes["api_version"].value < FFI_VERSION:
        kernel = attributes["backend_config"]
        attributes["call_target_name"] = ir.StringAttr.get(FFI_TARGET)
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), FFI_VERSION)
        attributes["backend_config"] = ir.DictAttr.get({"opaque": kernel})
    return results


class _NumpyTensor:
    """A NumPy array with the few methods of a torch tensor that Triton's interpreter calls."""

    device = "cpu"

    def __init__(self, array: np.ndarray):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_NumpyTensor":
        return self

    def cpu(self) -> "_NumpyTensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_NumpyTensor":
        return _NumpyTensor(self.array)

    def set_(self, *_: Any) -> "_NumpyTensor":
        return self

    def copy_(self, other: "_NumpyTensor") -> None:
        assert other.array is self.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> list[int]:
        return [stride // self.array.itemsize for stride in self.array.strides]


def _interpret(kernel, *arguments, out_shape, grid, input_output_aliases, **constants):
    shapes = [jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in out_shape]

    def run(*arrays: Any) -> list[np.ndarray]:
        inputs = [np.ascontiguousarray(array) for array in arrays]
        outputs = [np.zeros(shape.shape, shape.dtype) for shape in shapes]
        for argument, output in input_output_aliases.items():
            # An aliased output starts as its input, and the kernel may read it through either pointer.
            outputs[output] = inputs[argument] = np.array(inputs[argument])
        kernel[grid](*map(_NumpyTensor, [*inputs, *outputs]), **constants)
        return outputs

    return jax.pure_callback(run, shapes, *arguments, vmap_method="sequential")
