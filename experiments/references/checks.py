"""Results of comparisons with references."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    area: str
    """Part of memjax."""
    what: str
    """What was compared."""
    reference: str
    """What it was compared with."""
    measure: str
    """Meaning of the figure."""
    figure: float
    """A relative difference, or a number of differences."""
    bound: float
    """The largest figure that passes."""

    @property
    def passes(self) -> bool:
        """Whether the figure is within the bound; false for NaN."""
        return self.figure <= self.bound


def relative(found: object, expected: object) -> float:
    """The largest difference, relative to the largest expected number."""
    wide, wanted = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert wide.shape == wanted.shape, (wide.shape, wanted.shape)
    return float(np.abs(wide - wanted).max() / np.abs(wanted).max())
