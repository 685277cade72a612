"""Sequences of different lengths side by side in one tensor, with the mask that tells tokens from padding.

The one place where sequences are padded: extraction, generation, analyses and the training of generated models call it.
Batches are planned in extraction/activations.py; decoder.py turns masks into a model's attention arguments.

Shapes: B sequences, T positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class TokenBatch(NamedTuple):
    """Token ids of a batch."""

    ids_BT: Tensor
    """int64, 0 at padding."""
    mask_BT: Tensor
    """int64, 1 on tokens, 0 on padding."""


def pad(sequences: Sequence[Sequence[int] | np.ndarray], *, filler: int = 0, on_left: bool = False) -> Tensor:
    """int64 [B, T]: integers of every sequence, filled up to the longest, on the right unless on_left."""
    longest = max(map(len, sequences))
    padded_BT = np.full((len(sequences), longest), filler, dtype=np.int64)
    for row, sequence in zip(padded_BT, sequences, strict=True):
        start = longest - len(sequence) if on_left else 0
        row[start : start + len(sequence)] = sequence
    return torch.from_numpy(padded_BT)


def pad_tokens(sequences: Sequence[Sequence[int] | np.ndarray], *, on_left: bool = False) -> TokenBatch:
    """Token ids padded with 0, and their mask."""
    ones = [np.ones(len(sequence), dtype=np.int64) for sequence in sequences]
    return TokenBatch(pad(sequences, on_left=on_left), pad(ones, on_left=on_left))
