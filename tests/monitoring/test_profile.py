"""Which steps are traced, and what the table of a trace says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from memjax.config.log import ProfileConfig
from memjax.monitoring import profile
from memjax.monitoring.profile import Operation, ProfileWindow, describe_overlap, operations, overlaps, table

# Two GPUs: one stream computes, one copies; the host's own times do not count where there are devices.
GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion_12" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_3" } }
  event_metadata { key: 3 value { id: 3 name: "bag_kernel" } }
  event_metadata { key: 4 value { id: 4 name: "MemcpyD2D" } }
  event_metadata { key: 5 value { id: 5 name: "jit_step(123)" } }
  lines { id: 1 name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000000 }
    events { metadata_id: 3 offset_ps: 2000000000 duration_ps: 5000000000 }
    events { metadata_id: 2 offset_ps: 8000000000 duration_ps: 1000000000 } }
  lines { id: 2 name: "Stream #14(MemcpyD2D)"
    events { metadata_id: 4 offset_ps: 1000000000 duration_ps: 500000000 } }
  lines { id: 3 name: "XLA Modules"
    events { metadata_id: 5 offset_ps: 0 duration_ps: 9000000000 } }
}
planes {
  name: "/device:GPU:1"
  event_metadata { key: 1 value { id: 1 name: "bag_kernel" } }
  lines { id: 1 name: "Stream #13(Compute)" events { metadata_id: 1 offset_ps: 0 duration_ps: 1500000000 } }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "dot.1" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines { id: 1 name: "worker"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000000 stats { metadata_id: 1 str_value: "dot.1" } } }
}
"""

# 1 to 5 ms a collective, beside a kernel until 3 ms; another from 6 to 7 ms alone; nothing from 5 to 6 and 7 to 8 ms.
OVERLAP_TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion_12" } }
  event_metadata { key: 2 value { id: 2 name: "ncclDevKernel_AllGather_RING_LL" } }
  lines { id: 1 name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000000 }
    events { metadata_id: 1 offset_ps: 8000000000 duration_ps: 1000000000 } }
  lines { id: 2 name: "Stream #14(Communication)"
    events { metadata_id: 2 offset_ps: 1000000000 duration_ps: 4000000000 }
    events { metadata_id: 2 offset_ps: 6000000000 duration_ps: 1000000000 } }
}
"""

# A loop of 10 ms with a body of 3 + 4 ms, and events that are no operations.
CPU_TRACE = """
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "while.5" } }
  event_metadata { key: 2 value { id: 2 name: "dot.1.2" } }
  event_metadata { key: 3 value { id: 3 name: "tanh" } }
  event_metadata { key: 4 value { id: 4 name: "ExecuteHelper" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines { id: 1 name: "worker"
    events { metadata_id: 2 offset_ps: 1000000000 duration_ps: 3000000000 stats { metadata_id: 1 str_value: "d" } }
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000000 stats { metadata_id: 1 str_value: "w" } }
    events { metadata_id: 3 offset_ps: 5000000000 duration_ps: 4000000000 stats { metadata_id: 1 str_value: "t" } }
    events { metadata_id: 4 offset_ps: 0 duration_ps: 90000000000 } }
}
"""


def of_text(trace: str) -> list[tuple[str, float, int]]:
    return [(name, round(seconds, 9), uses) for name, seconds, uses in operations(ProfileData.from_text_proto(trace))]


def test_kernels_of_all_gpus_are_added_by_name():
    assert of_text(GPU_TRACE) == [("bag_kernel", 6.5e-3, 2), ("loop_add_fusion", 3e-3, 2), ("MemcpyD2D", 0.5e-3, 1)]


def test_on_a_cpu_a_loop_does_not_count_its_body_again():
    assert of_text(CPU_TRACE) == [("tanh", 4e-3, 1), ("while", 3e-3, 1), ("dot", 3e-3, 1)]


def test_the_table_has_shares_and_what_is_left_out():
    found = [Operation("a" * 100, 3.0, 2), Operation("b", 1.5, 1000), Operation("c", 0.25, 1), Operation("d", 0.25, 1)]
    assert table(found, 2).splitlines() == [
        "          ms   share    count  operation",
        f"   3,000.000   60.0%        2  {'a' * 77}...",
        "   1,500.000   30.0%    1,000  b",
        "     500.000   10.0%        2  (2 others)",
        "   5,000.000  100.0%    1,004  all",
    ]
    assert table([], 5) == "no operation is in the trace"


def run(window: ProfileWindow, steps: range, work=lambda: None) -> list[tuple[int, int]]:
    """Goes through the steps as the loop does; which of them were traced."""
    opened, traced = 0, []
    for step in steps:
        if window.opens(step):
            opened = step
            window.start(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            work()
        if window.closes(step, last=step == steps[-1]):
            traced.append((opened, step))
            window.stop(step)
    window.abandon()
    return traced


@pytest.fixture
def fake_profiler(monkeypatch):
    """Traces that cost nothing, and how often each end of one was called."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("config", "steps", "traced"),
    [
        (ProfileConfig(start=3, steps=2), range(1, 9), [(3, 4)]),
        (ProfileConfig(start=1, steps=1), range(1, 3), [(1, 1)]),
        (ProfileConfig(start=3, steps=9), range(1, 6), [(3, 5)]),
        (ProfileConfig(start=3, steps=4), range(5, 9), [(5, 6)]),
        (ProfileConfig(start=3, steps=2), range(5, 9), []),
    ],
)
def test_the_steps_of_the_config_are_traced(fake_profiler, tmp_path, config, steps, traced):
    assert run(ProfileWindow(config, tmp_path), steps) == traced
    assert fake_profiler == ["start", "stop"] * len(traced)


def test_other_processes_open_and_close_the_window_at_the_same_steps_without_a_trace(fake_profiler, tmp_path):
    window = ProfileWindow(ProfileConfig(start=2, steps=2), tmp_path, traces=False)
    assert run(window, range(1, 9)) == [(2, 3)]
    assert fake_profiler == []


def test_a_run_that_ends_early_ends_its_trace(fake_profiler, tmp_path):
    window = ProfileWindow(ProfileConfig(start=1, steps=5), tmp_path)
    window.start(1)
    window.abandon()
    window.abandon()
    assert fake_profiler == ["start", "stop"]


def test_a_profiler_that_fails_is_told_of_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise RuntimeError("another trace is under way")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    run(ProfileWindow(ProfileConfig(start=2, steps=2), tmp_path), range(1, 9))
    assert capsys.readouterr().err == (
        "log.profile: RuntimeError: another trace is under way. The run continues without it.\n"
    )


def test_a_trace_without_a_file_is_told_of(fake_profiler, tmp_path, capsys):
    run(ProfileWindow(ProfileConfig(start=2, steps=2), tmp_path), range(1, 9))
    assert "the profiler wrote no trace" in capsys.readouterr().err


def test_on_this_machine_the_operations_of_the_traced_steps_are_told(tmp_path, capsys):
    @jax.jit
    def work(x):
        return jnp.sort(jnp.tanh(x @ x), axis=0)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 200)), jnp.float32)
    work(x).block_until_ready()
    run(
        ProfileWindow(ProfileConfig(start=2, steps=3, top=20), tmp_path),
        range(1, 7),
        lambda: work(x).block_until_ready(),
    )
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == "profile of the steps 2 to 4"
    uses = {line.split()[-1]: int(line.split()[2]) for line in lines[2:-1]}
    assert uses["sort"] == 3
    assert "100.0%" in lines[-2]
    assert str(profile.newest_trace(tmp_path)) in lines[-1]


def test_overlap_is_what_collectives_share_with_other_work():
    found = overlaps(ProfileData.from_text_proto(OVERLAP_TRACE))
    assert list(found) == ["/device:GPU:0"]
    np.testing.assert_allclose(found["/device:GPU:0"], (9e-3, 2e-3, 5e-3, 3e-3))
    assert "collectives 5.0 ms, of which nothing else ran 3.0 ms" in describe_overlap(*found.popitem())


def test_a_gpu_alone_has_no_collectives_to_tell_of():
    assert overlaps(ProfileData.from_text_proto(CPU_TRACE)) == {}
    found = overlaps(ProfileData.from_text_proto(GPU_TRACE))
    np.testing.assert_allclose(found["/device:GPU:0"], (9e-3, 1e-3, 0, 0))
    assert "collectives" not in describe_overlap("/device:GPU:0", found["/device:GPU:0"])
