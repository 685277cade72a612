"""What is said about documents that cannot be used, and when there are too many of them for a run.

The corpus and the tokens stage count documents by reason; here the counts become lines for the terminal, with an
example for each reason, and the error that ends a run. What filters, `where` and duplicates leave out is told as well,
and ends nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.errors import InputError

SAID_FROM = 0.02
"""A smaller share of unusable documents is in the record alone."""
_NUM_REASONS = 4
_NUM_EXAMPLE_CHARACTERS = 120


class Unusable(NamedTuple):
    """Documents that cannot be used, by corpus."""

    dropped: Mapping[str, Mapping[str, int]]
    """By corpus and reason."""
    examples: Mapping[str, Mapping[str, str]]
    """By corpus and reason: the first such document, or what was wrong with it."""
    num_read: Mapping[str, int]
    """Documents of each corpus, those that cannot be used included."""

    def remarks(self, stage: str) -> list[str]:
        """A line for each corpus of which more than a few per cent cannot be used."""
        return [
            f"{stage}: {self._told(name)}"
            for name in self.dropped
            if self._num(name) > SAID_FROM * self.num_read.get(name, 0)
        ]

    def left_out(self, dropped: Mapping[str, Mapping[str, int]], stage: str) -> list[str]:
        """A line for each corpus of which more than a few per cent were left out for other reasons.

        dropped: every reason by corpus, those for which documents cannot be used among them.
        """
        lines = []
        for name, reasons in dropped.items():
            others = {why: count for why, count in reasons.items() if why not in self.dropped.get(name, {})}
            num = sum(others.values())
            num_read = self.num_read.get(name, 0) + num
            if num > SAID_FROM * num_read:
                told = "; ".join(f"{count:,} {why}" for why, count in _most_frequent(others)[:_NUM_REASONS])
                lines.append(f"{stage}: corpus {name!r}: {num:,} of {num_read:,} documents are left out: {told}")
        return lines

    def check(self, max_unusable_frac: float) -> None:
        """InputError where a larger share of a corpus than this cannot be used, or all of it."""
        for name in self.dropped:
            num, num_read = self._num(name), self.num_read.get(name, 0)
            if num and (num > max_unusable_frac * num_read or num >= num_read):
                raise InputError(
                    f"corpus.max_unusable_frac: expected at most {max_unusable_frac:.0%} of a corpus to be unusable, "
                    f"got {self._told(name)}; correct its columns or its files, or raise the limit"
                )

    def _num(self, name: str) -> int:
        return sum(self.dropped[name].values())

    def _told(self, name: str) -> str:
        reasons = _most_frequent(self.dropped[name])
        told = [f"{count:,} {reason}{self._example(name, reason)}" for reason, count in reasons[:_NUM_REASONS] if count]
        if len(reasons) > _NUM_REASONS:
            told.append(f"{sum(count for _, count in reasons[_NUM_REASONS:]):,} for other reasons")
        num, num_read = self._num(name), self.num_read.get(name, 0)
        return f"corpus {name!r}: {num:,} of {num_read:,} documents cannot be used: {'; '.join(told)}"

    def _example(self, name: str, reason: str) -> str:
        example = self.examples.get(name, {}).get(reason, "")
        return f" (such as {example[:_NUM_EXAMPLE_CHARACTERS]})" if example else ""


def _most_frequent(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
