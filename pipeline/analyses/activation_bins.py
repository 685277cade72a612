"""The bins of activation histograms: they grow by the square root of 2, from 2^-12 to 2^16."""

import numpy as np
import numpy.typing as npt

_STEPS_PER_DOUBLING = 2
_FIRST, _LAST = -12 * _STEPS_PER_DOUBLING, 16 * _STEPS_PER_DOUBLING
EDGES: npt.NDArray[np.float64] = 2.0 ** (np.arange(_FIRST, _LAST + 1) / _STEPS_PER_DOUBLING)
"""Ends of the bins, ascending. The first and the last bin also take what lies beyond them."""
