"""A bounded buffer of rows from which training draws at random, for rows that arrive in blocks and are not kept.

Every row that is put in is drawn exactly once. With each row the buffer keeps where it came from, so that a checkpoint
can say which rows of a block are still to come without storing activations. The order is a function of
the seed and of the blocks in their order; a larger buffer mixes better and costs rows x M x D x 2 bytes.

Shapes: n rows held, B rows drawn, M models, D width.
"""

import torch
from torch import Tensor


class ShuffleBuffer:
    """Rows waiting to be drawn.

    Args of the constructor: `num_rows`, how many rows `add` aims at (`is_full`; a block may overshoot it); `seed` of
    the draws.
    """

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self.num_rows = num_rows
        self._x_BMD: Tensor | None = None
        self._origin_B2 = torch.zeros(0, 2, dtype=torch.int64)
        self._held = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._held

    @property
    def is_full(self) -> bool:
        """Whether no further block is needed."""
        return self._held >= self.num_rows

    def origins(self) -> Tensor:
        """int64 [n, 2]: (block, row in the block) of every row that is held."""
        return self._origin_B2[: self._held].clone()

    def add(self, x_BMD: Tensor, origin_B2: Tensor) -> None:
        """Put rows in; their values are copied."""
        assert len(x_BMD) == len(origin_B2), (len(x_BMD), len(origin_B2))
        if self._x_BMD is None:
            self._x_BMD = x_BMD.new_empty(0, *x_BMD.shape[1:])
        end = self._held + len(x_BMD)
        if end > len(self._x_BMD):
            space = max(end, self.num_rows)
            self._x_BMD = _grown(self._x_BMD, space, self._held)
            self._origin_B2 = _grown(self._origin_B2, space, self._held)
        self._x_BMD[self._held : end] = x_BMD
        self._origin_B2[self._held : end] = origin_B2
        self._held = end

    def draw(self, num_rows: int) -> Tensor:
        """x_BMD of rows drawn uniformly without replacement; they leave the buffer."""
        assert self._x_BMD is not None and num_rows <= self._held, (num_rows, self._held)
        drawn_B = torch.randperm(self._held, generator=self._generator)[:num_rows]
        x_BMD = self._x_BMD[drawn_B]
        rest = self._held - num_rows
        is_drawn = torch.zeros(self._held, dtype=torch.bool)
        is_drawn[drawn_B] = True
        holes = is_drawn[:rest].nonzero().squeeze(1)
        movers = rest + (~is_drawn[rest:]).nonzero().squeeze(1)
        self._x_BMD[holes] = self._x_BMD[movers]
        self._origin_B2[holes] = self._origin_B2[movers]
        self._held = rest
        return x_BMD


def _grown(tensor: Tensor, num_rows: int, held: int) -> Tensor:
    grown = tensor.new_empty(num_rows, *tensor.shape[1:])
    grown[:held] = tensor[:held]
    return grown
