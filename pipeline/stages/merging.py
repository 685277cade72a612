"""Parts of a result put together in an order that does not depend on when they come, nor from whom.

The last digit of a floating-point sum depends on the order of its terms, and results of workers come in any order. So
parts are merged along a binary tree over their numbers, each pair as soon as both halves are there: the same parts give
the same bits, whatever workers are late or lost. Merging strictly in the order of the numbers would do so too, but one
late part would keep all later ones waiting in memory; here each missing part keeps at most one other per level waiting.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

Part = TypeVar("Part")


class MergeTree(Generic[Part]):
    """Takes the parts 0 .. num_parts - 1, each once, in any order.

    Args of the constructor: `merge`, of two neighbours, the one with the smaller numbers first.
    """

    def __init__(self, num_parts: int, merge: Callable[[Part, Part], Part]) -> None:
        assert num_parts > 0
        self._num_parts, self._merge = num_parts, merge
        self._waiting: dict[tuple[int, int], Part] = {}
        """By level (0: single parts) and place on it."""

    def __len__(self) -> int:
        """Merged parts that wait for their neighbours."""
        return len(self._waiting)

    def add(self, number: int, part: Part) -> None:
        """Merge a part with all that it completes."""
        level, size = 0, self._num_parts
        while size > 1:
            neighbour = number ^ 1
            if neighbour < size:  # the last of an odd level has none, and goes up as it is
                if (level, neighbour) not in self._waiting:
                    break
                other = self._waiting.pop((level, neighbour))
                part = self._merge(part, other) if number < neighbour else self._merge(other, part)
            level, number, size = level + 1, number // 2, (size + 1) // 2
        self._waiting[level, number] = part

    def total(self) -> Part:
        """All parts together, when all are there."""
        (part,) = self._waiting.values()
        return part
