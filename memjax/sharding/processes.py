"""Several processes that train one model: how they find each other, and how they end together.

Each process drives the devices of its machine, and JAX makes one mesh of them all. Every process runs the same program
on the same batches; the first one alone prints and writes what is not a checkpoint.

The connection is `jax.distributed`'s; where the processes are is read here, because JAX's own detection (0.10 and 0.11)
takes a shell within an allocation, as of salloc, for one process of a job step; cuts host lists at the first bracket,
so that `n[1-2]-ib` is n1; knows Open MPI's mpirun up to version 4 only (0.11 sends version 5 to mpi4py, and fails
without that package), and no other MPI; and its errors name environment variables instead of settings.
"""

import contextlib
import dataclasses
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import orbax.checkpoint as ocp

from memjax.config.checks import is_count
from memjax.config.devices import ProcessesConfig
from memjax.errors import ConfigError
from memjax.io.console import say, warn

LOST = 6
"""Exit code of a process that has lost the others, or never found them."""

_AGREED_CODES = (0, 5, 75)
"""Exit codes that all processes end with, at the same point of the run."""

_DAYS = 7
"""That the others wait while the first process works alone."""

_LAUNCHERS = {
    # Name: number of processes, number of this one, processes on this machine. Inner launchers come first: mpirun in
    # an allocation starts its daemons by srun, whose variables their children inherit, and they number the daemons.
    # srun itself may set PMI's variables, with the same numbers as its own.
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    # What srun sets of a job step only, since a shell inside an allocation sees the rest, too.
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", None),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """This process's place among the others."""

    launcher: str
    """Who said so."""
    count: int
    index: int
    coordinator: str
    """host:port of process 0."""

    def report(self, trouble: str) -> None:
        """Says which process has it."""
        warn(f"process {self.index} of {self.count}: {trouble}")


def find(config: ProcessesConfig, environ: Mapping[str, str]) -> Launch | None:
    """The place of this process among others, from the settings, or else from what launched it; None alone.

    Raises:
        ConfigError: it is one of several, but where the others are, or its own number, is not known.
    """
    if config.count == 1:
        return None
    launcher, count, index, several_machines = "settings", config.count, config.index, False
    if started := _launcher(environ, config):
        launcher, found, number = started
        here_name = _LAUNCHERS[launcher][2]
        here = (_number(environ, here_name) if here_name else None) or found
        several_machines = here < found or (_number(environ, "SLURM_STEP_NUM_NODES") or 1) > 1
        count, index = count or found, number if index is None else index
    completion = _number(environ, "JOB_COMPLETION_INDEX")
    if count and completion is not None:
        launcher, several_machines = "Kubernetes", True
        index = completion if index is None else index
    if count is None:
        return None
    coordinator = config.coordinator or (_first_machine(environ) if launcher == "SLURM" else None)
    problems = []
    if index is None:
        problems.append(f"processes.count={count}, but no launcher numbers them; give each its processes.index from 0")
    elif index >= count:
        problems.append(f"processes.index={index} must be below processes.count={count} ({launcher})")
    if coordinator is None:
        problems.append(
            f"{count} processes ({launcher}), but where process 0 runs is not known; set "
            "--processes.coordinator HOST:PORT to its machine and any free port there"
        )
    elif several_machines and re.match(r"(localhost|127\.|\[::1\])", coordinator):
        problems.append(
            f"processes.coordinator={coordinator} is this machine for every process, but {launcher} runs them on "
            "several; name the machine of process 0"
        )
    if problems:
        raise ConfigError(problems)
    assert index is not None
    assert coordinator is not None
    return Launch(launcher=launcher, count=count, index=index, coordinator=coordinator)


def _launcher(environ: Mapping[str, str], config: ProcessesConfig) -> tuple[str, int, int] | None:
    """The innermost launcher that started several processes, their number and the number of this one."""
    found: dict[str, tuple[int, int]] = {}
    for name, (count_name, index_name, _) in _LAUNCHERS.items():
        count, index = _number(environ, count_name), _number(environ, index_name)
        if count is not None and index is not None:
            found[name] = count, index
    if found.get("MPI") == found.get("SLURM"):  # PMI's variables are srun's own, and srun knows where process 0 runs
        found.pop("MPI", None)
    several = [name for name, (count, _) in found.items() if count > 1]
    if not several:
        return None
    innermost = next(iter(found))
    if found[innermost][0] == 1 and config.count is None:
        raise ConfigError(
            f"{innermost} started 1 process and {several[0]} {found[several[0]][0]}, and which of them started "
            "this one is not known; set --processes.count to the number of processes that train together"
        )
    return (several[0], *found[several[0]])


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """A number that a launcher has set; None where it is not set or empty."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not is_count(text):
        raise ConfigError(
            f"the environment has {name}={text!r}, which must be a whole number; correct it, or set --processes.count 1"
        )
    return int(text)


def run_together(config: ProcessesConfig, run: Callable[[], int]) -> int:
    """Runs with the other processes where there are any, and ends with them.

    Returns:
        The exit code of `run`. A process that fails alone, or has lost the others, does not return: it exits at once,
        since an orderly end would wait for the others, and the others for it.

    Raises:
        ConfigError: the processes cannot be found.
    """
    launch = find(config, os.environ)
    if launch is None:
        return run()
    say(
        f"process {launch.index} of {launch.count} ({launch.launcher}), coordinator {launch.coordinator}: waiting for "
        f"the others, at most {config.start_timeout} s"
    )
    try:
        _start(config, launch)
        with _output_of_the_first_only():
            code = run()
    except ConfigError as error:
        warn(str(error))
        code = 2
    except Exception as error:
        code = _explain(launch, error)
    if code not in _AGREED_CODES:
        _exit(code)
    jax.distributed.shutdown()
    return code


def is_first() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def process_zero_first(name: str) -> Iterator[None]:
    """Runs the block in the first process, then in all others, which find what it has written. Every block needs a name
    of its own.
    """
    if jax.process_count() == 1:
        yield
        return
    # Not a barrier of the devices: they give up after minutes, and preparing data may take hours.
    wait = partial(ocp.multihost.get_barrier_sync_fn(), key=name, timeout_ms=_DAYS * 24 * 3600 * 1000)
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def _first_machine(environ: Mapping[str, str]) -> str | None:
    """That of a SLURM job step, with a port that other jobs are unlikely to use: n[003-007,9]-ib is n003-ib."""
    numbers = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
    first = re.match(rf"(?:[\w.-]|{numbers})+(?=,|$)", environ.get("SLURM_STEP_NODELIST", "").strip(), re.ASCII)
    if first is None:
        return None
    host = re.sub(numbers, lambda found: re.findall(r"\d+", found[0])[0], first[0])
    job = re.match(r"\d+", environ.get("SLURM_JOB_ID", ""))  # 12+0 is a part of the heterogeneous job 12
    return f"{host}:{61440 + int(job[0] if job else 0) % 4096}"


def _start(config: ProcessesConfig, launch: Launch) -> None:
    def too_late() -> None:
        launch.report(
            f"the others did not come together at {launch.coordinator} within "
            f"processes.start_timeout={config.start_timeout} s. Are all {launch.count} started, does process 0 run "
            "there, and may they reach its port?"
        )
        _exit(LOST)

    # Programs that a CPU has under way at the same time would talk to the other processes in any order.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM away from the handlers that are there, and training agrees by itself on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would end the process with a stack trace of its own.
    timer = threading.Timer(config.start_timeout, too_late)
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        launch.coordinator,
        launch.count,
        launch.index,
        cluster_detection_method="deactivate",
        initialization_timeout=config.start_timeout + 60,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
    )
    timer.cancel()
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        # Seen with jax 0.10: programs of several simulated devices wait for each other for ever.
        raise ConfigError(
            f"{jax.local_device_count()} simulated CPU devices in each of {launch.count} processes cannot work "
            "together; set JAX_NUM_CPU_DEVICES=1 and start more processes"
        )


@contextlib.contextmanager
def _output_of_the_first_only() -> Iterator[None]:
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _explain(launch: Launch, error: Exception) -> int:
    # A lost connection comes as a ValueError, too, if it is lost while a program is being started.
    from_jax = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    if from_jax or "Gloo" in str(error) or "NCCL" in str(error):
        launch.report(
            f"has lost the others ({' '.join(str(error).split())[:300]}). What they printed last says why. The same "
            "command for all of them resumes from the latest checkpoint."
        )
        return LOST
    traceback.print_exc()
    return 1


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
