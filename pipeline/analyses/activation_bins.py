"""The bins of activation histograms: four to each doubling, from 2^-8 to 2^14."""

import numpy as np
import numpy.typing as npt

_STEPS_PER_DOUBLING = 4
_FIRST, _LAST = -8 * _STEPS_PER_DOUBLING, 14 * _STEPS_PER_DOUBLING
EDGES: npt.NDArray[np.float64] = 2.0 ** (np.arange(_FIRST, _LAST + 1) / _STEPS_PER_DOUBLING)
"""Ends of the bins, ascending. The first and the last bin also take what lies beyond them."""


def bin_of(values: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Index of the bin of each activation; a bin has its lower end and not its upper one."""
    return np.searchsorted(EDGES[1:-1], values, side="right")
