"""Several processes that train one model: how they find each other, and how they end together.

Each process drives the devices of its machine, and JAX makes one mesh of all of them. Every process runs the same
program on the same batches; only the first one prints, and writes files other than checkpoints.

`jax.distributed` connects the processes, but they are detected here, because JAX's own detection (0.10 and 0.11) takes
a shell within an allocation, such as salloc's, for one process of a job step; cuts host lists at the first bracket, so
that `n[1-2]-ib` becomes n1; supports mpirun only of Open MPI up to version 4 (0.11 passes version 5 on to mpi4py, and
fails without that package); and its errors name environment variables instead of settings.
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
"""Exit code of a process that lost the others, or never found them."""

_AGREED_CODES = (0, 5, 75)
"""Exit codes with which all processes end, at the same point of the run."""

_DAYS = 7
"""How long the others wait while the first process works alone."""

_LAUNCHERS = {
    # Name: number of processes, index of this one, processes on this machine. Inner launchers come first: mpirun in
    # an allocation starts its daemons by srun, and their children inherit srun's variables, which count the daemons.
    # srun itself may set PMI's variables, with the same values as its own.
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    # Only what srun sets for a job step, since a shell inside an allocation sees the other variables too.
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", None),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """This process's place among the others."""

    launcher: str
    """Where this was found."""
    count: int
    index: int
    coordinator: str
    """host:port of process 0."""

    def report(self, trouble: str) -> None:
        """Prints a problem and the process that has it."""
        warn(f"process {self.index} of {self.count}: {trouble}")


def find(config: ProcessesConfig, environ: Mapping[str, str]) -> Launch | None:
    """This process's place among the others, from the settings or else from its launcher; None if there are no others.

    Raises:
        ConfigError: there are others, but where they are, or the index of this one, is unknown.
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
    """The innermost launcher that started several processes, their number, and the index of this one."""
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
    """A number that a launcher has set; None if it is unset or empty."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not is_count(text):
        raise ConfigError(
            f"the environment has {name}={text!r}, which must be a whole number; correct it, or set --processes.count 1"
        )
    return int(text)


def run_together(config: ProcessesConfig, run: Callable[[], int]) -> int:
    """Runs together with the other processes, if there are any, and ends with them.

    Returns:
        The exit code of `run`. A process that fails alone, or loses the others, does not return but exits at once:
        an orderly end would wait for the others, and the others for it.

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
    """Runs the block in the first process, then in the others, which find what it wrote. Names must be unique."""
    if jax.process_count() == 1:
        yield
        return
    # Not a barrier of the devices, which gives up after minutes: preparing data may take hours.
    wait = partial(ocp.multihost.get_barrier_sync_fn(), key=name, timeout_ms=_DAYS * 24 * 3600 * 1000)
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def _first_machine(environ: Mapping[str, str]) -> str | None:
    """The first machine of a SLURM job step, with a port that other jobs are unlikely to use.

    n[003-007,9]-ib gives n003-ib.
    """
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

    # Programs that run concurrently on a CPU would communicate with the other processes in arbitrary order.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # The service would replace the handlers of SIGTERM, and training agrees on when to stop by itself.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would end the process with its own stack trace.
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
        # Seen with jax 0.10: programs on several simulated devices deadlock.
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
    # A connection that is lost while a program is being started is reported as a ValueError.
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
