"""Metrics in Weights & Biases."""

import dataclasses
import pathlib
import uuid

from memjax.config.log import WandbConfig
from memjax.config.run import RunConfig
from memjax.monitoring.trackers.tracker import Service, optional_package


class Wandb(Service):
    """A run in Weights & Biases."""

    def __init__(self, config: RunConfig, settings: WandbConfig, folder: pathlib.Path):
        library = optional_package("wandb", "wandb")
        super().__init__(folder / "wandb.json")
        if "step" not in self.notes:  # of a start that sent nothing, and may have had other settings
            self.keep(id=uuid.uuid4().hex[:12])
        self.run = library.init(
            project=settings.project,
            name=settings.name or folder.resolve().name,
            id=self.notes["id"],
            resume="allow",
            mode=settings.mode,
            dir=str(folder),
            config=dataclasses.asdict(config),
            # It would take the whole process's output in hand otherwise.
            settings={"console": "off"},
        )
