"""Compiles every Triton kernel for sm_90; needs a CUDA build of JAX's plugin, but no GPU."""

import os
import subprocess
import sys

import pytest

# Runs in another process, since this one uses Triton's interpreter.
PROGRAM = """
import functools, importlib, sys

import jax
import jax.numpy as jnp

from memjax.ops import triton_call
from memjax.ops.row_formats import formats
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import NormRule, RowRule, row_step
from memjax.ops.table import Table

triton_call.compute_capability = 90
bag, dot, search, update, grouped, norm, decode, product = (
    importlib.import_module(f"memjax.ops.{name}.triton")
    for name in (
        *("embedding_bag", "embedding_dot", "product_key_search", "row_update", "grouped_matmul", "rms_norm"),
        *("decode_attention", "matvec"),
    )
)


def compile(name, function, *arguments):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # XLA would end its CUDA graph at a custom call of an older API version.
    calls = [line for line in lowered.splitlines() if "triton_kernel_call" in line]
    assert calls, f"{name}: no kernel in the program"
    assert all("@triton_kernel_call_ffi(" in call and "api_version = 4" in call for call in calls), name
    print(name, len(calls))


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


for dtype, dim in ((jnp.bfloat16, 1024), (jnp.float32, 48)):
    table = array(dtype, 1000, dim)
    for tokens in (1, 800):
        indices, weights = array(jnp.int32, tokens, 128), array(jnp.float32, tokens, 128)
        compile(f"bag {dim} of {tokens}", bag.embedding_bag, table, indices, weights)
        compile(f"dot {dim} of {tokens}", dot.embedding_dot, table, indices, array(dtype, tokens, dim))
    x, scale = array(dtype, 40, dim), array(jnp.float32, dim)
    compile(f"norm {dim}", functools.partial(norm.rms_norm, epsilon=1e-5), x, scale)
    added = functools.partial(norm.added_rms_norm, epsilon=1e-5)
    compile(f"norm of a sum {dim}", added, x, x, scale)
    compile(f"norm gradient {dim}", functools.partial(norm.rms_norm_gradient, epsilon=1e-5), x, scale, x, x)

for name, width in (("int8", 1024), ("float8_e4m3", 96), ("int4", 100), ("bfloat16", 1024)):
    form, indices = formats.find(name), array(jnp.int32, 8, 20)
    groups = form.groups(width)
    scales = array(jnp.bfloat16, 1000, groups) if groups else None
    payload = array(form.payload_dtype, 1000, form.payload_columns(width))
    on_device = Table(payload, scales, format=form, value_dtype="bfloat16")
    at_address = Table(
        array(jnp.uint32, 2), scales, format=form, value_dtype="bfloat16", place="host", pinned=(1000, width)
    )
    for where, table in (("device", on_device), ("host", at_address))[name == "bfloat16" :]:
        compile(f"bag {name} {width} {where}", bag.embedding_bag, table, indices, array(jnp.float32, 8, 20))
        compile(f"dot {name} {width} {where}", dot.embedding_dot, table, indices, array(jnp.bfloat16, 8, width))

for dtype, num, top_k in ((jnp.bfloat16, 1024, 32), (jnp.float32, 16, 3)):
    queries, keys = array(dtype, 8, 2, 32), array(dtype, 2, 2, num, 16)
    found = array(jnp.int32, 8, 2, top_k), array(jnp.float32, 8, 2, top_k)
    find = functools.partial(search.product_key_search, top_k=top_k)
    compile(f"search {num}", find, queries, keys)
    compile(f"search of one {num}", find, array(dtype, 1, 2, 32), keys)
    compile(f"search of many {num}", find, array(dtype, 800, 2, 32), keys)
    weighted = functools.partial(search.weighted_search, top_k=top_k, scale=0.5)
    compile(f"weights {num}", weighted, queries, keys)
    compile(f"search gradient {num}", search.search_gradient, queries, keys, *found)

for dtype, inputs, outputs in ((jnp.bfloat16, 1024, 2816), (jnp.float32, 24, 40)):
    rows, matrices, sizes = array(dtype, 500, inputs), array(dtype, 4, inputs, outputs), array(jnp.int32, 4)
    cotangent = array(dtype, 500, outputs)
    transposed = functools.partial(grouped.grouped_matmul, transposed=True)
    compile(f"experts {inputs}", grouped.grouped_matmul, rows, matrices, sizes)
    compile(f"experts transposed {inputs}", transposed, cotangent, matrices, sizes)
    compile(f"experts gradient {inputs}", grouped.matrices_gradient, rows, cotangent, sizes)

for dtype, heads, width in ((jnp.bfloat16, 16, 64), (jnp.bfloat16, 4, 128), (jnp.float32, 2, 24)):
    cache = array(dtype, 2, heads, 1024, width)
    joined, angles = array(dtype, 2, (16 + 2 * heads) * width), array(dtype, 2, width // 2)
    step = functools.partial(decode.decode_step, window=None)
    compile(f"step {heads}", step, joined, cache, cache, array(jnp.int32, 2), (angles, angles))

for dtype, inputs, outputs in ((jnp.bfloat16, 2816, 1024), (jnp.float32, 24, 40)):
    for gated in (False, True):
        times, residual = functools.partial(product.matvec, gated=gated), None if gated else array(dtype, outputs)
        x, rows, bias = array(dtype, inputs), array(dtype, outputs, inputs), array(dtype, outputs)
        for beside in ((None, None), (bias, x)):
            compile(f"matvec {inputs} {gated} {len(set(beside))}", times, x, rows, residual, *beside)

for rule in (RowRule(), NormRule(state_columns=1024), RowRule(kind="adam")):
    kind, table = rule.kind, array(jnp.bfloat16, 1000, 1024)
    state = jax.eval_shape(lambda: rule.init(1000, 1024))
    gradient = RowGradient(array(jnp.int32, 8, 20), array(jnp.float32, 8, 20), array(jnp.bfloat16, 8, 1024))
    step = jax.eval_shape(lambda: row_step(1e-3, 0))
    compile(f"update {kind}", lambda t, s, g, at: update.row_update(t, s, [g], rule, at), table, state, gradient, step)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"JAX_PLATFORMS": "cpu"}

    def run(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    missing = run("import jax_triton")
    if missing.returncode:
        pytest.skip(f"jax_triton cannot be imported: {missing.stderr.strip().splitlines()[-1]}")
    done = run(PROGRAM)
    assert done.returncode == 0, done.stderr
    kernels = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()}
    assert kernels["search 1024"] == kernels["update rowwise_adam"] == 2
    assert len(kernels) == 58
