"""How a process finds the others, and that it does not wait for them forever."""

import os
import pathlib
import subprocess
import sys

import pytest

from memjax.config.devices import ProcessesConfig
from memjax.errors import ConfigError
from memjax.sharding.processes import Launch, find, run_together

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[007-008],spare1",
    "SLURM_PROCID": "3",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("settings", "environ", "place"),
    [
        ({}, SLURM, Launch(launcher="SLURM", count=4, index=3, coordinator="node007:61441")),
        (
            {},
            SLURM | {"SLURM_STEP_NODELIST": "gpu-a"},
            Launch(launcher="SLURM", count=4, index=3, coordinator="gpu-a:61441"),
        ),
        ({"coordinator": "ib0:1"}, SLURM, Launch(launcher="SLURM", count=4, index=3, coordinator="ib0:1")),
        ({"coordinator": "n1:9"}, OPEN_MPI, Launch(launcher="Open MPI", count=4, index=1, coordinator="n1:9")),
        (
            {"coordinator": "127.0.0.1:9"},
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            Launch(launcher="Open MPI", count=4, index=1, coordinator="127.0.0.1:9"),
        ),
        (
            {"coordinator": "n1:9"},
            {"PMI_SIZE": "2", "PMI_RANK": "0"},
            Launch(launcher="MPI", count=2, index=0, coordinator="n1:9"),
        ),
        (
            {"count": 3, "coordinator": "train-0.train:9"},
            {"JOB_COMPLETION_INDEX": "2"},
            Launch(launcher="Kubernetes", count=3, index=2, coordinator="train-0.train:9"),
        ),
        (
            {"count": 2, "index": 1, "coordinator": "localhost:9"},
            {},
            Launch(launcher="settings", count=2, index=1, coordinator="localhost:9"),
        ),
        ({}, {}, None),
        # A shell inside an allocation of several tasks is not a task itself.
        ({}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        ({}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        # The pods of an indexed job may be separate runs.
        ({}, {"JOB_COMPLETION_INDEX": "2"}, None),
        ({"count": 1}, SLURM, None),
        # mpirun on four nodes starts three daemons by srun, whose variables number the daemons and not the ranks.
        *[
            (
                {"coordinator": "n1:9"},
                SLURM
                | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": str(rank // 8 - 1)}
                | {"OMPI_COMM_WORLD_SIZE": "32", "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
                Launch(launcher="Open MPI", count=32, index=rank, coordinator="n1:9"),
            )
            for rank in (8, 16, 31)
        ],
        (
            {"coordinator": "n1:9"},
            SLURM | {"PMI_SIZE": "8", "PMI_RANK": "6"},
            Launch(launcher="MPI", count=8, index=6, coordinator="n1:9"),
        ),
        # srun --mpi=pmi2 sets both.
        (
            {},
            SLURM | {"PMI_SIZE": "4", "PMI_RANK": "3"},
            Launch(launcher="SLURM", count=4, index=3, coordinator="node007:61441"),
        ),
        # Empty variables count as unset, and component 0 of the heterogeneous job 4097 has the job's id.
        ({}, dict.fromkeys([*SLURM, *OPEN_MPI, "PMI_SIZE", "PMI_RANK", "JOB_COMPLETION_INDEX"], ""), None),
        (
            {},
            SLURM | dict.fromkeys(OPEN_MPI, "") | {"SLURM_JOB_ID": "4097+0", "SLURM_STEP_NUM_NODES": ""},
            Launch(launcher="SLURM", count=4, index=3, coordinator="node007:61441"),
        ),
    ],
)
def test_a_process_is_one_of_several_only_if_told_so(settings, environ, place):
    assert find(ProcessesConfig(**settings), environ) == place


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        (
            {"coordinator": "127.0.0.1:9"},
            SLURM,
            "processes.coordinator=127.0.0.1:9 is this machine for every process, but",
        ),
        ({"coordinator": "localhost:9"}, OPEN_MPI, "but Open MPI runs them on several; name the machine of process 0"),
        ({"count": 2, "coordinator": "[::1]:9"}, {"JOB_COMPLETION_INDEX": "0"}, "but Kubernetes runs them on several"),
        ({}, OPEN_MPI, "4 processes (Open MPI), but where process 0 runs is not known; set --processes.coordinator"),
        ({"count": 2, "coordinator": "n1:9"}, {}, "processes.count=2, but no launcher numbers them; give each its"),
        ({"count": 2}, SLURM, "processes.index=3 must be below processes.count=2 (SLURM)"),
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "4(x2)"}, "the environment has SLURM_STEP_NUM_TASKS='4(x2)', which must"),
        ({"count": 2}, {"JOB_COMPLETION_INDEX": "-1"}, "the environment has JOB_COMPLETION_INDEX='-1', which must be"),
        ({}, SLURM | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "Open MPI started 1 process and SLURM 4, and which of"),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "n[1-"}, "4 processes (SLURM), but where process 0 runs is not known"),
    ],
)
def test_what_cannot_be_found_is_refused_with_a_way_out(settings, environ, message):
    with pytest.raises(ConfigError) as caught:
        find(ProcessesConfig(**settings), environ)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("n[1-2]-ib", "n1-ib"),
        ("n[001,007-015]-ib,other", "n001-ib"),
        ("rack[0-1]node[3-4]", "rack0node3"),
        ("rack[01-02]node[003-004].cluster.org,x[1-2]", "rack01node003.cluster.org"),
        ("n[1-2].cluster.org", "n1.cluster.org"),
        ("a.b.c,n[1-2]", "a.b.c"),
    ],
)
def test_process_0_is_on_the_first_node_of_the_list(nodes, first):
    launch = find(ProcessesConfig(), SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert launch is not None
    assert launch.coordinator == f"{first}:61441"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "node1"}, "coordinator=node1 must be HOST:PORT, as in node1:12345"),
        ({"count": 2, "index": 2}, "index=2 must be below count=2: the first process is 0"),
        ({"start_timeout": 0}, "start_timeout=0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ProcessesConfig(**settings)


def test_a_single_process_runs_directly(monkeypatch):
    for name in SLURM | OPEN_MPI | {"PMI_SIZE": ""}:
        monkeypatch.delenv(name, raising=False)
    assert run_together(ProcessesConfig(), lambda: 5) == 5


@pytest.mark.slow
def test_a_process_that_nobody_joins_ends_with_a_message(tmp_path):
    lonely = "--processes.count 2 --processes.index 1 --processes.coordinator 127.0.0.1:9 --processes.start_timeout 1"
    done = subprocess.run(
        [sys.executable, "-m", "memjax.train", "--run.dir", str(tmp_path / "run"), *lonely.split()],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 6, done.stderr
    assert done.stdout.startswith("process 1 of 2 (settings), coordinator 127.0.0.1:9: waiting for the others")
    assert "the others did not come together at 127.0.0.1:9 within processes.start_timeout=1 s." in done.stderr
    assert not (tmp_path / "run").exists()
