"""Resuming a run needs no more memory than starting one, on any mesh."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import re, sys
import jax
from memjax.checkpoint import Checkpoints
from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.training.state import to_items
from memjax.sharding.mesh import make_mesh
from memjax.training.start import first_state
from memjax.training.program import TrainProgram

folder, how, devices = sys.argv[1:]
config = load(RunConfig, None, f'''
--model.dim 64 --model.num_layers 1 --model.num_heads 2 --model.ffn_dim 64 --model.vocab_size 259
--model.memory.layers 0 --model.memory.num_keys 700 --model.memory.top_k 4 --model.memory.value_dim 128
--optim.table.state_columns 64 --data.batch_size 4 --mesh.memory {devices}
'''.split())
program, mesh = TrainProgram.of(config), make_mesh(config)

def peak():
    # Of this program: getrusage would tell that of the parent where it was higher.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
    if how == "fresh":
        state = first_state(program, mesh)
        print("peak", peak() - before)
        checkpoints.save(1, to_items(state), {})
    else:
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        state = jax.tree.map(place, program.abstract_state, program.shardings(mesh))
        jax.block_until_ready(checkpoints.restore(to_items(state)).arrays)
        print("peak", peak() - before)
"""


def peak_of_start(folder: pathlib.Path, how: str, *, devices: int) -> int:
    """The bytes by which a process grows while it starts or resumes."""
    # Compile as users do: optimised code draws a table much faster, and compiling needs memory itself.
    settings_of_tests = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in settings_of_tests} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", PROGRAM, str(folder), how, str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split("peak ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's account of a program's memory"
)
def test_resuming_needs_no_more_memory_than_starting_even_on_another_mesh(tmp_path):
    # 250 MB, far more than everything else.
    table = 4 * 700**2 * 128
    fresh = peak_of_start(tmp_path, "fresh", devices=2)
    assert fresh > table
    # Blocks are read ahead, in threads, so the peak varies; another copy of the table, or of one device's half, would
    # be larger than that.
    assert peak_of_start(tmp_path, "resume", devices=1) <= fresh + 0.3 * table
