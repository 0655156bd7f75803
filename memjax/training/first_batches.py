"""Checks the first batches of a run for target tokens."""

from memjax.config.data import DataConfig
from memjax.data.packing import Batch
from memjax.errors import ConfigError

PATIENCE = 8
"""Number of batches without a target token after which the data is refused."""


class FirstBatches:
    """Refuses data without target tokens, for example because sequences are cut off before the answers begin."""

    def __init__(self, data: DataConfig, *, first_step: int = 0):
        """Checks nothing in a run that resumes, whose remaining batches may well have no target tokens."""
        self._data = data
        self._unlearned: int | None = None if first_step else 0
        """Batches without a target token so far; None once there was one."""

    def check(self, batch: Batch, *, last: bool) -> None:
        """Checks the next batch; `last` if no other follows.

        Raises:
            ConfigError: no batch so far has a target token, and PATIENCE or all of them were seen.
        """
        if self._unlearned is None:
            return
        self._unlearned = None if batch["loss_mask"].any() else self._unlearned + 1
        if self._unlearned and (last or self._unlearned == PATIENCE):
            raise ConfigError(self._why())

    def _why(self) -> str:
        data = self._data
        found = f"no token of the first {self._unlearned} batches counts in the loss"
        if data.packing == "none":
            return (
                f"data.sequence_length={data.sequence_length} is too short for data.packing=none, which cuts every "
                f"record there: {found}; raise data.sequence_length, or set data.packing to first_fit"
            )
        return (
            f"data.sequence_length={data.sequence_length} x data.batch_size={data.batch_size} holds nothing but "
            f"prompts: {found}; raise one of them, or look at what the records have under "
            f"data.answer_key={data.answer_key}"
        )
