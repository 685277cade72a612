"""Loss curves and verdicts are what they were; what differs is printed as a table, and the changelog has to say it."""

import re
from pathlib import Path

import pytest

from tests.golden.goldens import ALL, FLOAT64, VERDICTS, Golden, compute, differences, digest, is_equal

CHANGELOG = Path(__file__).parent.parent.parent / "CHANGELOG.md"


@pytest.mark.parametrize("golden", ALL, ids=lambda golden: golden.name)
def test_the_numbers_are_the_stored_ones(golden: Golden, tmp_path: Path) -> None:
    found = differences(golden, golden.read(), compute(golden, tmp_path))
    if not is_equal(golden, found):
        pytest.fail(
            f"{len(found)} values of {golden.path.name} differ by more than {golden.atol:g} + {golden.rtol:g} of the "
            "stored value. Where that is meant: `make golden`, and a line in CHANGELOG.md.\n"
            f"{found.to_string(max_rows=60)}",
            pytrace=False,
        )


def test_a_difference_is_found_and_one_other_word_is_one_too_many() -> None:
    stored = VERDICTS.read()
    changed = stored.copy()
    changed.loc[("l1", 3), "delta_norm"] += 0.1
    changed.loc[("batch_topk", 5), "verdict"] = "another"
    found = differences(VERDICTS, stored, changed)
    assert sorted(found.index) == [("batch_topk", 5), ("l1", 3)]
    assert not is_equal(VERDICTS, found)
    curve = FLOAT64.read()
    moved = curve.copy()
    moved.loc[("l1", 7), "loss"] *= 1 + 1e-4
    assert differences(FLOAT64, curve, moved)["column"].tolist() == ["loss"]


def test_the_changelog_names_the_golden_numbers() -> None:
    """Regenerated files have another digest, so that they cannot be committed without a line that says why."""
    named = re.findall(r"\bgolden ([0-9a-f]{12})\b", CHANGELOG.read_text())
    assert digest() in named, f'expected "Numbers change: ... (golden {digest()})" in CHANGELOG.md, got {named}'
