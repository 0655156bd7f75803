"""The folder of a run: its config, environment, tokenizer and paths."""

import contextlib
import json
import os
import pathlib
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.config.load import differences, load, to_yaml
from memjax.config.run import RunConfig
from memjax.data.dataset import train_tokenizer
from memjax.data.sources.kinds import Source
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import ConfigError
from memjax.io.console import say, warn
from memjax.io.files import read_object, write_atomic
from memjax.io.lock import Locked, locked
from memjax.io.paths import local_path
from memjax.monitoring.metrics import has_metrics
from memjax.runs.environment import environment
from memjax.runs.layout import CHECKPOINTS
from memjax.runs.saved import read_config, read_tokenizer
from memjax.sharding.processes import is_first, process_zero_first

_WHERE_IT_RUNS = ("run.dir", "run.mirror", "run.compile_cache", "data.prepared", "mesh.", "processes.")
"""Settings that do not affect the results of a run."""

_MAY_CHANGE = (
    *_WHERE_IT_RUNS,
    "data.malformed",
    "data.max_malformed",
    "data.max_record_bytes",
    "data.damaged_files",
    "checkpoint.",
    "eval.",
    "log.",
    "train.remat",
)
"""Settings that a resumed run may change: they do not affect what is learned."""

_ONLY_AT_THE_START = (
    "data.tokenizer.",
    "model.embedding_init_std",
    "model.memory.value_init_scale",
    "model.peer.value_init_scale",
    "train.init_from",
)
"""Settings that a run never reads again once it has a step: to record a change of them would be untrue."""

_SUBFOLDERS = (CHECKPOINTS, "evals", "patches", "plots", "prepared", "profile", "tensorboard", "wandb")
"""Subfolders that a run writes."""

_LOCK = ".lock"


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.config = path / "config.yaml"
        """The settings of the run's last step."""
        self.config_history = path / "config_history.jsonl"
        """One line of JSON for each resumption that changed settings."""
        self.checkpoints = path / CHECKPOINTS
        """The saved steps."""
        self.metrics = path / "metrics.jsonl"
        """One line of JSON per step."""
        self.profile = path / "profile"
        """Profiler traces of a few steps."""
        self.plots = path / "plots"
        """PNG files."""
        self.summary = path / "summary.json"
        """Written last: a run that has it is finished."""

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """The folder that the config names."""
        return cls(local_path(config.run.dir, "run.dir"))

    @property
    def resume_command(self) -> str:
        """The command that resumes the run with its own settings."""
        return f"python -m memjax.train {shlex.quote(str(self.path))}"

    def read_summary(self) -> dict[str, Any] | None:
        """The report of a finished run; None while it is unfinished, or if the report is damaged."""
        summary = read_object(self.summary) or {}
        is_report = isinstance(summary.get("metrics"), dict) and isinstance(summary.get("steps"), int)
        return summary if is_report else None

    def write_json(self, name: str, content: dict[str, Any]) -> pathlib.Path:
        """Replaces a JSON file atomically."""
        return write_atomic(self.path / name, json.dumps(content, indent=2) + "\n")

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keeps other processes out of the folder while the block runs; the folder is removed again if it stays empty.

        Raises:
            ConfigError: another process trains there, or the folder cannot be written or has links that leave it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.dir={self.path} is a file; name a folder")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / _LOCK))
            except Locked as error:
                raise ConfigError(
                    f"run.dir={self.path} is in use: {error} trains there; stop it, or name another run.dir"
                ) from None
            except OSError as error:
                reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
                raise ConfigError(
                    f"run.dir={self.path} cannot be written ({reason}); make it writable, or name another run.dir"
                ) from None
            self._refuse_links()
            yield

    def check_shared(self) -> None:
        """Raises ConfigError unless the folder is the one that process 0 owns."""
        file = self.path / _LOCK
        if not file.exists():
            raise ConfigError(
                f"{file.absolute()} exists for process 0, but not here; name a run.dir that all machines share"
            )

    def began(self) -> bool:
        """Whether the folder holds a step or metrics; until then, any settings may start a run in it."""
        return bool(Checkpoints(self.checkpoints).steps()) or has_metrics(self.metrics)

    def saved_config(self) -> RunConfig | None:
        """The settings of the run; None if it has not begun. All processes must call it.

        Raises:
            ConfigError: config.yaml is damaged, or of another version, and there is no checkpoint.
            CheckpointError: config.yaml cannot be read, and neither can the checkpoints.
        """
        if not self.began():
            return None
        has_steps = bool(Checkpoints(self.checkpoints).steps())
        if self.config.exists():
            try:
                return load(RunConfig, self.config)
            except ConfigError as error:
                if not has_steps:
                    raise
                warn(f"warning: {error}; using the settings in its newest checkpoint")
        # Metrics without settings or a step cannot be continued.
        return read_config(self.path) if has_steps else None

    def claim(self, config: RunConfig, *, allow_changed: bool = False) -> "Claim":
        """Compares settings with those of the run in the folder; writes nothing. All processes must call it.

        More steps need no permission: they continue the run, even a finished one.

        Raises:
            ConfigError: the folder holds a run with other settings (if it has a checkpoint, those of the start may not
                change even if allowed), or a finished run that these would change.
            CheckpointError: the settings of the run cannot be read.
        """
        saved = self.saved_config()
        if saved is None:
            return Claim(self, config)
        changed = differences(saved, config)
        summary = self.read_summary()
        if summary is not None and config.train.steps <= summary["steps"]:
            self._check_finished(changed, summary["steps"])
            return Claim(self, config, summary=summary)
        fixed = [line for line in changed if line.startswith(_ONLY_AT_THE_START)]
        # A run that has no checkpoint yet starts again from these settings.
        if fixed and Checkpoints(self.checkpoints).steps():
            raise ConfigError(
                [
                    f"{self.path} holds a run that has begun, and these settings only affect the beginning of a run; "
                    "set them back, or name another --run.dir for a new run:",
                    *(f"  {line}" for line in fixed),
                ]
            )
        more_steps = config.train.steps > saved.train.steps
        refused = [
            line
            for line in changed
            if not line.startswith(_MAY_CHANGE) and not (more_steps and line.startswith("train.steps:"))
        ]
        if refused and not allow_changed:
            raise ConfigError(
                [
                    f"{self.path} holds a run with other settings. To continue it with its own: {self.resume_command}; "
                    "with those given here: pass --allow_changed; for a new run: name another --run.dir. They differ "
                    "in:",
                    *(f"  {line}" for line in refused),
                ]
            )
        for line in changed:
            say(f"changed: {line}")
        return Claim(self, config, before=saved, changes=changed)

    def tokenizer(self, config: RunConfig, data: Source) -> Tokenizer:
        """The run's tokenizer. Until there is a checkpoint, every start builds it anew from the settings.

        It comes from the run's checkpoints, train.init_from or data.tokenizer.path, or it is trained. All processes
        must call this; the first one trains, and the others read what it writes.

        Raises:
            ConfigError: it has more tokens than the model has embeddings.
            DataError: the data or the tokenizer's file cannot be used.
            CheckpointError: train.init_from cannot be read.
        """
        tokenizer = self.saved_tokenizer()
        if tokenizer is not None:
            return _fitting(tokenizer, config, f"of the run in {self.path}; set it back")
        # All processes read a checkpoint together, but only one trains a tokenizer.
        tokenizer = make_tokenizer(config, data) if config.train.init_from else None
        with process_zero_first("tokenizer"):
            if is_first():
                tokenizer = tokenizer or make_tokenizer(config, data)
                if jax.process_count() > 1:
                    tokenizer.save(self.path)
                return tokenizer
            return Tokenizer.load(self.path)

    def saved_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the run's checkpoints; None while there are none. All processes must call it."""
        return read_tokenizer(self.path) if Checkpoints(self.checkpoints).steps() else None

    def _check_finished(self, changed: Sequence[str], steps: int) -> None:
        refused = [line for line in changed if not line.startswith(_WHERE_IT_RUNS)]
        if refused:
            raise ConfigError(
                [
                    f"{self.path} is finished with {steps} steps and cannot change. To train it longer: "
                    f"{self.resume_command} --train.steps N with N above {steps}; for a new run: name another "
                    "--run.dir. The settings given here differ in:",
                    *(f"  {line}" for line in refused),
                ]
            )

    def _refuse_links(self) -> None:
        """Refuses subfolders linked elsewhere, as in a copied run: a run writes and deletes only inside its folder."""
        links = [self.path / name for name in _SUBFOLDERS if (self.path / name).is_symlink()]
        real = lambda path: pathlib.Path(os.path.realpath(path))
        outside = [link for link in links if not real(link).is_relative_to(real(self.path))]
        if outside:
            raise ConfigError(
                [
                    f"{link} is a link to {real(link)}, and a run writes only inside its folder; move that folder "
                    "here, or put all of run.dir there"
                    for link in outside
                ]
            )


class Claim:
    """The start of a run in its folder, recorded once its first step is done."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        *,
        before: RunConfig | None = None,
        changes: Sequence[str] = (),
        summary: dict[str, Any] | None = None,
    ):
        self.folder, self.config, self.before, self.changes = folder, config, before, tuple(changes)
        self.finished = summary
        """The report, if the run has already made all its steps."""
        self._recorded = False

    def record(self, step: int, tokenizer: Tokenizer) -> None:
        """Writes settings, environment and tokenizer, on the first call and in the first process only.

        The summary of a run that had finished with fewer steps is renamed to summary-STEPS.json.
        """
        if self._recorded or not is_first():
            return
        folder = self.folder
        if (summary := folder.read_summary()) is not None:
            os.replace(folder.summary, folder.path / f"summary-{summary['steps']}.json")
        if self.changes:
            line = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S%z"), "changes": self.changes}
            file = folder.config_history
            earlier = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
            write_atomic(file, earlier + json.dumps(line).encode() + b"\n")
        tokenizer.save(folder.path)
        write_atomic(folder.config, to_yaml(self.config))
        folder.write_json("environment.json", environment())
        self._recorded = True  # last, so that the next call tries again after an error such as a full disk


def make_tokenizer(config: RunConfig, data: Source) -> Tokenizer:
    """The tokenizer with which a run with these settings and data would start.

    Raises:
        ConfigError: it has more tokens than the model has embeddings.
        DataError: the data or the tokenizer's file cannot be used.
        CheckpointError: train.init_from cannot be read.
    """
    source = config.train.init_from
    tokenizer = read_tokenizer(source) if source else train_tokenizer(data, config.model.vocab_size)
    return _fitting(tokenizer, config, f"{f'of {source}' if source else 'that data.tokenizer asks for'}; raise it")


def _fitting(tokenizer: Tokenizer, config: RunConfig, whose: str) -> Tokenizer:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of the "
            f"tokenizer {whose}"
        )
    return tokenizer
