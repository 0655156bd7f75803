"""The folder of a run: its config, environment, tokenizer, and where the rest goes."""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from memjax.command_line import differences, load, to_yaml
from memjax.config import RunConfig
from memjax.data.dataset import train_tokenizer
from memjax.data.sources import Source, find_source
from memjax.data.tokenizer import Tokenizer
from memjax.errors import ConfigError
from memjax.loading import CHECKPOINTS, read_tokenizer

MAY_CHANGE = (
    "run.dir",
    "run.compile_cache",
    "data.prepared",
    "data.malformed",
    "data.max_malformed",
    "data.max_record_bytes",
    "data.damaged_files",
    "mesh.",
    "processes.",
    "checkpoint.",
    "eval.",
    "log.",
    "train.remat",
)
"""Settings that a resumed run may change: they do not decide what is learned."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: pathlib.Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """The folder that the config names."""
        return cls(pathlib.Path(config.run.dir))

    @property
    def checkpoints(self) -> pathlib.Path:
        """The saved steps."""
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> pathlib.Path:
        """One line of JSON a step."""
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> pathlib.Path:
        """Traces of some steps."""
        return self.path / "profile"

    @property
    def plots(self) -> pathlib.Path:
        """PNG files."""
        return self.path / "plots"

    @property
    def summary(self) -> pathlib.Path:
        """Written last: a run that has it is finished."""
        return self.path / "summary.json"

    def read_summary(self) -> dict[str, Any] | None:
        """What the finished run reported; None while it is not finished."""
        return json.loads(self.summary.read_text()) if self.summary.exists() else None

    def write_json(self, name: str, content: dict[str, Any]) -> pathlib.Path:
        """Writes a JSON file whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)
        return path

    def claim(self, config: RunConfig, *, allow_changed: bool = False, writes: bool = True) -> None:
        """Writes the resolved config, or compares it with the one that the run began with.

        One that does not write, as every process but the first, expects that it is written.

        Raises:
            ConfigError: the folder holds a run with other settings, or is not the one that the first process sees.
        """
        file = self.path / "config.yaml"
        if not writes and not file.exists():
            raise ConfigError(
                [f"{file.absolute()} is there for process 0, but not here; name a run.dir that all machines share"]
            )
        if file.exists():
            changed = differences(load(RunConfig, file), config)
            refused = [line for line in changed if not line.startswith(MAY_CHANGE)]
            if refused and not allow_changed:
                raise ConfigError(
                    [
                        f"{self.path} holds a run with other settings; continue it with its own, name another run.dir, "
                        "or pass --allow_changed:",
                        *(f"  {line}" for line in refused),
                    ]
                )
            for line in changed:
                print(f"changed: {line}", flush=True)
        if not writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(config))
        self.write_json("environment.json", environment())

    def tokenizer(self, config: RunConfig, data: Source | None = None) -> Tokenizer:
        """The run's tokenizer: read from the folder, or taken from train.init_from or trained, and kept there.

        Args:
            config: of the run.
            data: the config's, where it has been found before.

        Raises:
            ConfigError: it has more tokens than the model has embeddings.
            CheckpointError: train.init_from cannot be read.
        """
        if (self.path / "tokenizer.json").exists():
            tokenizer = Tokenizer.load(self.path)
        else:
            source = config.train.init_from
            tokenizer = (
                read_tokenizer(source)
                if source
                else train_tokenizer(data or find_source(config.data), config.model.vocab_size)
            )
            tokenizer.save(self.path)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                [
                    f"model.vocab_size={config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of the "
                    f"tokenizer in {self.path}; raise it, or name another run.dir"
                ]
            )
        return tokenizer


def environment() -> dict[str, Any]:
    """What a run depends on besides its config."""
    from importlib.metadata import version

    packages = (
        "memjax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "jax-triton",
        "triton",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except ImportError:  # not installed; memjax itself may run from a checkout
            versions[package] = None
    source = pathlib.Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "devices": [device.device_kind for device in jax.devices()],
    }
