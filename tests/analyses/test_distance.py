"""Sums, table and verdict about next tokens, from comparisons written by hand."""

import pytest
import torch

from pipeline.analyses.distance import (
    DISTANCE_COLUMNS,
    KL_FLOOR,
    MARGIN_FLOOR,
    MAXIMA,
    Distance,
    add_distance,
    empty_distance,
    judge,
)
from pipeline.analyses.next_tokens import Comparison
from pipeline.analyses.rows import Sums, merge_sums
from pipeline.errors import InputError
from pipeline.numerics.statistics import jackknife_interval

SETS = ("all", "assistant", "corpus web")
GROUPS = 8


def _comparison(kl: torch.Tensor, margin: torch.Tensor | None = None, shift: float = 0.0) -> Comparison:
    margin = torch.zeros_like(kl) if margin is None else margin
    return Comparison(kl.double(), margin > 0, margin.double(), torch.full_like(kl, shift).double())


def _sums(
    kl: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    rounding: float = 0.0,
    shift: float = 0.0,
    per_document: int = 5,
) -> Sums:
    """Consecutive positions in documents of equal length; odd ones are an assistant's, and no corpus is named."""
    document_P = torch.arange(len(kl)) // per_document
    in_set_PS = torch.stack([torch.ones(len(kl)), torch.arange(len(kl)) % 2, torch.zeros(len(kl))], 1).bool()
    sums = empty_distance(GROUPS, len(SETS))
    add_distance(
        sums,
        base=_comparison(kl, margin),
        rounding=_comparison(torch.full_like(kl, rounding), shift=shift),
        in_set_PS=in_set_PS,
        group_P=document_P % GROUPS,
        document_P=document_P,
    )
    return sums


def _judge(*arguments: object, **keywords: object) -> Distance:
    return judge(_sums(*arguments, **keywords), SETS, dtype="float32")  # type: ignore[arg-type]


def test_the_table_holds_means_with_intervals_over_documents_of_every_set_with_tokens() -> None:
    kl = torch.rand(40, generator=torch.Generator().manual_seed(0))
    margin = (torch.arange(40) % 4 == 0) * 0.5
    found = _judge(kl, margin=margin)
    assert tuple(found.table.columns) == tuple(column.name for column in DISTANCE_COLUMNS)
    everywhere, assistant = (row for _, row in found.table.iterrows())  # the corpus has no token and no row
    assert (everywhere["tokens"], everywhere["num_tokens"], everywhere["num_documents"]) == ("all", 40, 8)
    assert (assistant["num_tokens"], assistant["disagreement"]) == (20, 0)
    assert everywhere["kl"] == pytest.approx(float(kl.double().mean()))
    expected = jackknife_interval(kl.double().view(8, 5).sum(1)[:, None], torch.full((8, 1), 5.0))
    assert everywhere["kl_high"] == pytest.approx(float(expected.high))
    assert everywhere["disagreement"] == 0.25
    assert everywhere["largest_margin"] == 0.5
    assert (everywhere["kl_floor"], everywhere["margin_floor"]) == (KL_FLOOR, MARGIN_FLOOR)
    assert 0 < assistant["disagreement_high"] < 1  # none of 20 tokens is not certainty
    assert found.is_distinguishable


@pytest.mark.parametrize(
    ("kl", "rounding", "is_distinguishable"),
    [(0.0, 0.0, False), (1e-6, 0.0, False), (2e-5, 0.0, True), (2e-4, 1e-4, False), (4e-4, 1e-4, True)],
)
def test_kl_is_judged_against_what_rounding_explains(kl: float, rounding: float, is_distinguishable: bool) -> None:
    found = _judge(torch.full((40,), kl), rounding=rounding)
    assert found.is_distinguishable == is_distinguishable
    assert found.table["kl_floor"][0] == pytest.approx(max(KL_FLOOR, 3 * rounding))
    assert ("cannot be told apart" in found.reason) != is_distinguishable
    assert ("float32 show" in found.reason) == (rounding > 0 and not is_distinguishable)


def test_one_clear_disagreement_is_enough_and_a_tie_is_none() -> None:
    """One token of 4,000 whose KL is lost in the mean."""
    margin = torch.zeros(4000)
    margin[17] = 2.0
    assert _judge(torch.zeros(4000), margin=margin).is_distinguishable
    assert not _judge(torch.zeros(4000), margin=margin / 1e4).is_distinguishable
    assert not _judge(torch.zeros(4000), margin=margin, shift=1.1).is_distinguishable  # rounding moves tokens as far


def test_a_difference_in_one_set_alone_is_a_difference() -> None:
    """The mean over all is below the floor, that over the assistant's tokens above."""
    kl = torch.where(torch.arange(40) % 2 == 1, 1.4e-5, 0.0)
    found = _judge(kl)
    assert found.table["kl_high"][0] < KL_FLOOR < found.table["kl"][1]
    assert found.is_distinguishable


def test_one_document_has_no_interval_and_is_judged_by_its_mean() -> None:
    found = _judge(torch.full((5,), 1e-8))
    assert found.table["kl_high"].isna().all()
    assert not found.is_distinguishable
    assert _judge(torch.full((5,), 0.1)).is_distinguishable


def test_parts_merge_to_the_whole() -> None:
    kl = torch.rand(80, generator=torch.Generator().manual_seed(1))
    whole = _sums(kl, margin=kl, rounding=1e-5, shift=0.1)
    parts = [
        _sums(kl[:40], margin=kl[:40], rounding=1e-5, shift=0.1),
        _sums(kl[40:], margin=kl[40:], rounding=1e-5, shift=0.05),
    ]
    for pair in (parts, parts[::-1]):
        merged = merge_sums(*pair, maxima=MAXIMA)
        for name, value in whole.items():
            torch.testing.assert_close(merged[name], value)


def test_no_token_and_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="got none"):
        judge(empty_distance(GROUPS, len(SETS)), SETS, dtype="float32")
    with pytest.raises(InputError, match="float32, got NaN or Inf"):
        _judge(torch.tensor([0.1, float("nan")]))
