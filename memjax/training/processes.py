"""Several processes that train one model: how they find each other, and how they end together.

Each process drives the devices of its machine, and JAX makes one mesh of them all. Every process runs the same program
on the same batches; the first one alone prints and writes what is not a checkpoint.
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

from memjax.config import ProcessesConfig
from memjax.errors import ConfigError

LOST = 6
"""Exit code of a process that has lost the others, or never found them."""

_AGREED_CODES = (0, 5, 75)
"""Exit codes that all processes end with, at the same point of the run."""

_DAYS = 7
"""That the others wait while the first process works alone."""

_LAUNCHERS = {
    # Name: number of processes, number of this one, processes on this machine. What srun sets of a job step only, since
    # a shell inside an allocation sees the rest, too.
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", None),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
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
        print(f"process {self.index} of {self.count}: {trouble}", file=sys.stderr, flush=True)


def find(config: ProcessesConfig, environ: Mapping[str, str]) -> Launch | None:
    """The place of this process among others, from the settings, or else from what launched it; None alone.

    Raises:
        ConfigError: it is one of several, but where the others are, or its own number, is not known.
    """
    if config.count == 1:
        return None
    launcher, count, index, several_machines = "settings", config.count, config.index, False
    for name, (count_name, index_name, here_name) in _LAUNCHERS.items():
        found = int(environ.get(count_name, 1))
        if found > 1 and index_name in environ:
            launcher, count = name, count or found
            index = int(environ[index_name]) if index is None else index
            here = int(environ.get(here_name, found)) if here_name else found
            several_machines = here < found or int(environ.get("SLURM_STEP_NUM_NODES", 1)) > 1
            break
    if count and "JOB_COMPLETION_INDEX" in environ:
        launcher, several_machines = "Kubernetes", True
        index = int(environ["JOB_COMPLETION_INDEX"]) if index is None else index
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
    print(
        f"process {launch.index} of {launch.count} ({launch.launcher}), coordinator {launch.coordinator}: waiting for "
        f"the others, at most {config.start_timeout} s",
        flush=True,
    )
    try:
        _start(config, launch)
        with _output_of_the_first_only():
            code = run()
    except ConfigError as error:
        print(error, file=sys.stderr)
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
def first_alone(name: str) -> Iterator[None]:
    """The block in the first process, then in all others, which find what it has written.

    Args:
        name: of the block; no other may have it.
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
    """Of a SLURM job step, with a port that other jobs are unlikely to use: node[003-007,9] is node003."""
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", ""))
    if first is None:
        return None
    return f"{first[1]}{first[2] or ''}:{61440 + int(environ.get('SLURM_JOB_ID', 0)) % 4096}"


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
        heartbeat_timeout_seconds=config.silence_timeout,
    )
    timer.cancel()
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        # Seen with jax 0.10: programs of several simulated devices wait for each other for ever.
        raise ConfigError(
            [
                f"{jax.local_device_count()} simulated CPU devices in each of {launch.count} processes cannot work "
                "together; set JAX_NUM_CPU_DEVICES=1 and start more processes"
            ]
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
            "command for all of them goes on from the newest checkpoint."
        )
        return LOST
    traceback.print_exc()
    return 1


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
