"""Times the bag from tables on the device and in host memory: `python experiments/bench/host_table.py [--small]`.

For 1, 8, 64 and 2,048 tokens, in bfloat16, int8 and int4, relative to the bandwidth of a copy on the device and of the
link to host memory, measured in the same run. On a CPU, or with --small, small sizes only show that everything runs.
"""

import argparse
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import memjax
from memjax.errors import ConfigError
from memjax.ops.row_formats import formats
from memjax.ops.row_formats.formats import row_bytes

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import timing
from random_table import random_table

COLUMNS = ("format", "place", "tokens", "ms", "GB/s", "of copy", "of link", "over device")
PICKS = 128


def link_bandwidth(num_bytes: int) -> float:
    """Bytes per second from host memory to the device, by JAX's copy, from pinned memory if available."""
    source = np.ones(num_bytes, np.uint8)
    device = jax.devices()[0]
    if any(memory.kind == "pinned_host" for memory in device.addressable_memories()):
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        source = jax.block_until_ready(jax.device_put(source, pinned))
    target = jax.sharding.SingleDeviceSharding(device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(source, target))
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    parser.add_argument("--small", action="store_true", help="small sizes (always on a CPU)")
    arguments = parser.parse_args()
    small = arguments.small or jax.default_backend() == "cpu"
    num_rows, width = (4096, 128) if small else (1 << 20, 1024)
    copy = max(timing.copy_bandwidth(1 << 24 if small else 1 << 31).values())
    link = link_bandwidth(1 << 24 if small else 1 << 30)
    environment = timing.environment()
    ceilings = f"copy {copy / 1e9:.0f} GB/s, link {link / 1e9:.1f} GB/s"
    print(f"{environment['device']}: {ceilings}", flush=True)
    print(timing.table([], COLUMNS))
    bag, rows = jax.jit(functools.partial(memjax.embedding_bag, mode="promise_in_bounds")), []
    rounds = {"rounds": 3, "calls": 2} if small else {"rounds": 9, "calls": 10}
    for name in ("bfloat16", "int8", "int4"):
        on_device: dict[int, float] = {}
        for place in ("device", "host"):
            try:
                table = random_table(formats.find(name), place, num_rows, width)
            except ConfigError as error:
                print(f"{name} in {place} memory: {error}", flush=True)
                continue
            for tokens in (1, 8) if small else (1, 8, 64, 2048):
                shape = (tokens, PICKS)
                inputs = [
                    (timing.draw_indices("uniform", num_rows, shape, seed), jnp.full(shape, 0.01)) for seed in range(3)
                ]
                ms = timing.median_ms(functools.partial(bag, table), inputs, **rounds)
                on_device.setdefault(tokens, ms)
                speed = tokens * PICKS * row_bytes(table.format, width) / ms * 1e3
                row = {
                    "format": name,
                    "place": place,
                    "tokens": tokens,
                    "ms": ms,
                    "GB/s": speed / 1e9,
                    "of copy": speed / copy,
                    "of link": speed / link if place == "host" else None,
                    "over device": ms / on_device[tokens],
                }
                rows.append(row)
                print(timing.table([row], COLUMNS).splitlines()[-1], flush=True)
    record = {**environment, "copy_bytes_per_second": copy, "link_bytes_per_second": link, "rows": rows}
    stem, title = timing.stem("host-table", small=small), "Bags from device and host memory"
    timing.write_report(arguments.out, stem, record, COLUMNS, title=title, note=ceilings)


if __name__ == "__main__":
    main()
