"""Metrics as TensorBoard's event files."""

import pathlib
import uuid
from typing import Any

from memjax.monitoring.trackers.tracker import optional_package

_FLUSH_SECONDS = 15


class TensorBoard:
    """Event files. Those of an earlier start stay; TensorBoard hides their steps that this start makes again."""

    def __init__(self, folder: pathlib.Path, last_step: int):
        library = optional_package("tensorboardX", "tensorboardX")
        # Files are named by the second they were made in; the suffix keeps two starts within one second apart.
        self._writer = library.SummaryWriter(
            str(folder), purge_step=last_step + 1, flush_secs=_FLUSH_SECONDS, filename_suffix=f".{uuid.uuid4().hex[:8]}"
        )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the numbers of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()
