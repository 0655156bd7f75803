"""The table that summarises a trace."""

import numpy as np
from jax.profiler import ProfileData

from memjax.monitoring.profile import Operation, describe_overlap, operations, overlaps, table

# Two GPUs, each with a compute and a copy stream; host events do not count if there are devices.
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

# A collective at 1 to 5 ms, overlapped by a kernel until 3 ms, another alone at 6 to 7 ms; idle at 5 to 6 and 7 to 8.
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

# A loop of 10 ms with a body of 3 + 4 ms, and events that are not operations.
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


def test_the_table_has_shares_and_the_remainder():
    found = [Operation("a" * 100, 3.0, 2), Operation("b", 1.5, 1000), Operation("c", 0.25, 1), Operation("d", 0.25, 1)]
    assert table(found, 2).splitlines() == [
        "          ms   share    count  operation",
        f"   3,000.000   60.0%        2  {'a' * 77}...",
        "   1,500.000   30.0%    1,000  b",
        "     500.000   10.0%        2  (2 others)",
        "   5,000.000  100.0%    1,004  all",
    ]
    assert table([], 5) == "the trace has no operations"


def test_overlap_is_what_collectives_share_with_other_work():
    found = overlaps(ProfileData.from_text_proto(OVERLAP_TRACE))
    assert list(found) == ["/device:GPU:0"]
    np.testing.assert_allclose(found["/device:GPU:0"], (9e-3, 2e-3, 5e-3, 3e-3))
    assert "collectives 5.0 ms, of which 3.0 ms exposed" in describe_overlap(*found.popitem())


def test_a_single_gpu_has_no_collectives_to_report():
    assert overlaps(ProfileData.from_text_proto(CPU_TRACE)) == {}
    found = overlaps(ProfileData.from_text_proto(GPU_TRACE))
    np.testing.assert_allclose(found["/device:GPU:0"], (9e-3, 1e-3, 0, 0))
    assert "collectives" not in describe_overlap("/device:GPU:0", found["/device:GPU:0"])
