"""Planted concepts in rows: where they are, how strong they are, and that nothing else changes."""

import torch

from pipeline.numerics.injection import Injection, directions
from pipeline.schema import BASE, CHAT

ROWS, WIDTH, CONCEPTS = 40_000, 16, 6


def rows() -> torch.Tensor:
    x_BMD = torch.randn(ROWS, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    return x_BMD.bfloat16().float()  # as stores hold them


def injection(frequency: float = 0.02, seed: int = 3) -> Injection:
    norm_C = torch.linspace(1, 2, CONCEPTS)
    return Injection(directions(rows()[:, CHAT], norm_C=norm_C, seed=seed), frequency, seed)


def test_each_concept_is_on_its_share_of_the_rows_and_independent_of_the_others():
    present_BC = injection().strengths(rows()) > 0
    standard_error = (0.02 * 0.98 / ROWS) ** 0.5
    assert ((present_BC.double().mean(0) - 0.02).abs() < 4 * standard_error).all()
    correlation_CC = torch.corrcoef(present_BC.double().T) - torch.eye(CONCEPTS)
    assert correlation_CC.abs().max() < 4 / ROWS**0.5


def test_a_concept_adds_its_direction_to_the_chat_model_alone():
    x_BMD, chosen = rows(), injection()
    changed_BMD, strength_BC = chosen(x_BMD), chosen.strengths(rows())
    assert torch.equal(changed_BMD[:, BASE], x_BMD[:, BASE]) and torch.equal(x_BMD, rows())
    expected_BD = x_BMD[:, CHAT] + strength_BC @ chosen.direction_CD
    torch.testing.assert_close(changed_BMD[:, CHAT], expected_BD)
    is_alone_B = (strength_BC > 0).sum(1) == 1
    added_B = (changed_BMD - x_BMD)[is_alone_B, CHAT].norm(dim=1)
    norm_B = chosen.direction_CD.norm(dim=1)[strength_BC[is_alone_B].argmax(1)]
    factor_B = added_B / norm_B
    assert 0.499 < factor_B.min() < 0.51 and 1.49 < factor_B.max() < 1.501  # even between a half and three halves
    assert abs(factor_B.mean() - 1) < 4 * (1 / 12 / len(factor_B)) ** 0.5


def test_order_batches_and_the_precision_of_the_store_change_nothing():
    x_BMD, chosen = rows(), injection()
    strength_BC = chosen.strengths(x_BMD)
    order_B = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(chosen.strengths(x_BMD[order_B]), strength_BC[order_B])
    parts = torch.cat([chosen.strengths(part) for part in x_BMD.split(999)])
    assert torch.equal(parts, strength_BC)
    assert torch.equal(chosen.strengths(x_BMD.bfloat16()), strength_BC)
    other_BC = injection(seed=4).strengths(x_BMD)
    assert ((other_BC > 0) & (strength_BC > 0)).double().mean() < 0.002  # another seed, other rows


def test_directions_lie_among_the_rows_and_have_the_norms_asked_for():
    flat_BD = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(2))
    flat_BD[:, 4:] = 7.0  # nothing varies there
    direction_CD = directions(flat_BD, norm_C=torch.tensor([0.5, 3.0]), seed=1)
    torch.testing.assert_close(direction_CD.norm(dim=1), torch.tensor([0.5, 3.0]))
    assert (direction_CD[:, 4:] == 0).all()
