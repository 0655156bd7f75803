"""Metrics in Trackio."""

import dataclasses
import pathlib

from memjax.config.log import TrackioConfig
from memjax.config.run import RunConfig
from memjax.monitoring.trackers.tracker import Service, optional_package


class Trackio(Service):
    """A run in Trackio."""

    def __init__(self, config: RunConfig, settings: TrackioConfig, folder: pathlib.Path):
        library = optional_package("trackio", "trackio")
        super().__init__(folder / "trackio.json")
        self.run = library.init(
            project=settings.project,
            name=settings.name or folder.resolve().name,
            # Runs are found again by name alone: only a folder that has begun one may go on with it.
            resume="allow" if self.notes else "never",
            config=dataclasses.asdict(config),
            embed=False,
        )
