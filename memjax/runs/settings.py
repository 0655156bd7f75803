"""Settings shared by the commands that read a trained model, and loading it. JAX is imported only when needed."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from memjax.config.checks import is_count
from memjax.config.section import Positive, Section
from memjax.errors import ConfigError

if TYPE_CHECKING:
    from memjax.runs.load import LoadedModel


TableFormat = Literal["saved", "float32", "bfloat16", "float16", "int8", "float8_e4m3", "int4"]


# Without slots, so that a command's settings can inherit from several of these and `super()` works.
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings(Section):
    """The checkpoint of the run."""

    step: str = "latest"
    """The checkpoint: latest, best (lowest validation loss) or a step number."""

    def problems(self) -> Iterator[str]:
        if self.step not in ("latest", "best") and not is_count(self.step):
            yield f"step={self.step} must be latest, best or the number of a checkpoint"

    @property
    def checkpoint(self) -> int | Literal["latest", "best"]:
        """The step as an argument of `memjax.load`."""
        if self.step == "latest" or self.step == "best":
            return self.step
        return int(self.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings(StepSettings):
    """The checkpoint, and its devices."""

    memory_devices: Positive[int] = 1
    """Devices over which tables are split by columns, for tables too large for one."""
    patch: tuple[str, ...] = ()
    """Patches whose rows replace the model's, after any applied to the run; see `python -m memjax.patch`."""

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of `memjax.load`."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceSettings(CheckpointSettings):
    """The checkpoint, its devices, and the format and place of its tables, which are read-only."""

    ema: bool = False
    """Use the moving average of the dense parameters (optim.ema_decay), with the current tables."""
    table_format: TableFormat = "saved"
    """How table rows are stored. saved: as in the checkpoint; int8 and float8_e4m3 take half as many bytes as bfloat16,
    int4 a quarter, with a small loss of accuracy."""
    table_place: Literal["device", "host"] = "device"
    """Where tables are kept. host: in host memory, from which the GPU reads the rows it needs, for tables larger than
    its memory."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.memory_devices > 1 and self.table_place == "host":
            yield (
                f"memory_devices={self.memory_devices} splits tables over devices and table_place=host keeps them off "
                "devices; leave one of the two out"
            )
        for name, default in (("table_format", "saved"), ("table_place", "device")):
            if self.patch and (value := getattr(self, name)) != default:
                yield (
                    f"{name}={value} and patch={', '.join(self.patch)} do not go together: patches are for tables as "
                    f"they were saved; leave one of the two out, or apply the patch with `python -m memjax.patch apply "
                    "RUN PATCH --out NEW` and use that run"
                )

    @property
    def options(self) -> dict[str, Any]:
        table_format = None if self.table_format == "saved" else self.table_format
        return {"ema": self.ema, "table_format": table_format, "table_place": self.table_place}


@contextlib.contextmanager
def loaded(run: str, settings: CheckpointSettings) -> Iterator["LoadedModel"]:
    """Loads the model of a run, under the mesh over which it is sharded.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its tables are read-only and the command is not for
            inference.
        ConfigError: there are fewer devices than memory_devices, or they cannot split the tables evenly.
    """
    import jax

    from memjax.io import compilation_cache
    from memjax.sharding.rules import DATA, MEMORY

    compilation_cache.enable()
    count = settings.memory_devices
    if count == 1:
        yield _load(run, settings)
        return
    if count > jax.device_count():
        raise ConfigError(f"memory_devices={count} must be at most {jax.device_count()}: there are no more devices")
    automatic = jax.sharding.AxisType.Auto
    axes = (DATA, MEMORY)
    mesh = jax.make_mesh((1, count), axes, axis_types=(automatic, automatic), devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        yield _load(run, settings)


def _load(run: str, settings: CheckpointSettings) -> "LoadedModel":
    from memjax.models.parts import split_decoder, writable
    from memjax.runs.load import load_advising
    from memjax.runs.tables import LOAD_OPTIONS, LoadOption

    known: list[LoadOption] = [option for option in LOAD_OPTIONS if hasattr(settings, option)]
    found = load_advising(known, run, step=settings.checkpoint, patches=settings.patch, **settings.options)
    if not isinstance(settings, InferenceSettings):
        writable(split_decoder(found.model)[2], run)
    return found
