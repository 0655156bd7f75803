"""What the command lines that read a trained model have in common. Nothing here imports JAX before it is needed."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from memjax.errors import ConfigError

if TYPE_CHECKING:
    from memjax.loading import LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSettings:
    """Which checkpoint of the run, and where it is put."""

    step: str = "latest"
    """The checkpoint: latest, best (lowest validation loss) or its number."""
    memory_devices: int = 1
    """Devices that share the tables by columns, for tables too large for one."""

    def __post_init__(self) -> None:
        problems = []
        if self.step not in ("latest", "best") and not self.step.isdecimal():
            problems.append(f"step={self.step} must be latest, best or the number of a checkpoint")
        if self.memory_devices < 1:
            problems.append(f"memory_devices={self.memory_devices} must be positive")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def checkpoint(self) -> int | Literal["latest", "best"]:
        """The step as `memjax.load` takes it."""
        if self.step == "latest" or self.step == "best":
            return self.step
        return int(self.step)


@contextlib.contextmanager
def loaded(run: str, settings: CheckpointSettings) -> Iterator["LoadedModel"]:
    """The model of a run's folder, under the mesh that it is split over.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: there are fewer devices than memory_devices, or they cannot split the tables evenly.
    """
    import jax

    from memjax.loading import load
    from memjax.memory import parallel

    count = settings.memory_devices
    if count == 1:
        yield load(run, step=settings.checkpoint)
        return
    if count > jax.device_count():
        raise ConfigError([f"memory_devices={count} must be at most {jax.device_count()}: there are no more devices"])
    automatic = jax.sharding.AxisType.Auto
    axes = (parallel.DATA, parallel.MEMORY)
    mesh = jax.make_mesh((1, count), axes, axis_types=(automatic, automatic), devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        yield load(run, step=settings.checkpoint)


def exit_code(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Runs a command; what users can mend is printed without a traceback, and `interrupted` after a Ctrl-C.

    Returns:
        What the command returns (None is 0); 2 for a wrong setting, 3 for data and 4 for a checkpoint that cannot be
        used; 130 for a Ctrl-C that the command does not catch itself.
    """
    from memjax.errors import CheckpointError, DataError

    codes = {ConfigError: 2, DataError: 3, CheckpointError: 4}
    try:
        return command() or 0
    except tuple(codes) as error:
        print(error, file=sys.stderr)
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
