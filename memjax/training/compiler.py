"""XLA's compiler options for the training step."""

import os

_GPU_OPTIONS = {
    # cuBLAS alone is faster for products of these sizes: 2 % of a dense step on an H200.
    "xla_gpu_enable_triton_gemm": False,
}
_SEVERAL_GPUS_OPTIONS = {
    # Collectives start early and end late, with other work in between.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}


def compiler_options(platform: str, devices: int) -> dict[str, bool] | None:
    """XLA's options for a step on that many devices of a platform; those that the user sets in XLA_FLAGS are kept."""
    if platform != "gpu":
        return None
    wanted = _GPU_OPTIONS | (_SEVERAL_GPUS_OPTIONS if devices > 1 else {})
    return {name: value for name, value in wanted.items() if name not in os.environ.get("XLA_FLAGS", "")}
