"""The trackers that a config asks for: started at the beginning of a run, closed at its end."""

import pathlib
import time
from collections.abc import Iterable

from memjax.config.run import RunConfig
from memjax.monitoring.trackers.sinks import TensorBoard, Trackio, Wandb
from memjax.monitoring.trackers.tracker import Tracker

CLOSE_SECONDS = 15.0
"""Longest wait for a tracker at the end of a run; SIGKILL usually follows SIGTERM after about 30 seconds."""


def make_trackers(config: RunConfig, folder: pathlib.Path, *, last_step: int) -> list[Tracker]:
    """The trackers that a config asks for.

    The run resumes from last_step: TensorBoard hides later steps that it already has, and the other trackers do not get
    them again. The state that this needs is in the folder.
    """
    log, trackers = config.log, []
    if log.tensorboard:
        trackers.append(Tracker("log.tensorboard", lambda: TensorBoard(folder / "tensorboard", last_step)))
    if wandb := log.wandb:
        trackers.append(Tracker("log.wandb", lambda: Wandb(config, wandb, folder)))
    if trackio := log.trackio:
        trackers.append(Tracker("log.trackio", lambda: Trackio(config, trackio, folder)))
    return trackers


def close_trackers(trackers: Iterable[Tracker], seconds: float = CLOSE_SECONDS) -> None:
    """Lets all trackers send what they still have, concurrently, and waits for at most `seconds`."""
    trackers = list(trackers)
    end = time.monotonic() + seconds
    for tracker in trackers:
        tracker.finish()
    for tracker in trackers:
        tracker.wait(end - time.monotonic())
