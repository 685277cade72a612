from collections.abc import Callable

import pytest
import torch

from pipeline.analyses.rows import analyse
from pipeline.analyses.twins import Twins, find_twins
from pipeline.errors import InputError
from pipeline.schema import TWIN_COLUMNS


def _decoder() -> torch.Tensor:
    """0, 1 chat-only; 2, 3 base-only; 4 shared. (0, 2) point the same way, 1 and 3 do not."""
    W_dec_FMD = torch.zeros(5, 2, 3)
    W_dec_FMD[0, 1] = torch.tensor([1.0, 0.1, 0.0])
    W_dec_FMD[1, 1] = torch.tensor([0.0, 1.0, 0.0])
    W_dec_FMD[2, 0] = torch.tensor([2.0, 0.0, 0.0])
    W_dec_FMD[3, 0] = torch.tensor([0.0, -1.0, 0.0])
    W_dec_FMD[4] = torch.tensor([1.0, 0.0, 0.0])
    return W_dec_FMD


def test_twins_are_pairs_of_opposite_owners_with_one_direction() -> None:
    pairs = find_twins(_decoder())
    assert (pairs.latent_chat.tolist(), pairs.latent_base.tolist()) == ([0], [2])
    assert float(pairs.cosine[0]) == pytest.approx(1 / 1.01**0.5)
    assert len(find_twins(_decoder()[:2]).cosine) == 0
    assert len(find_twins(_decoder()[2:]).cosine) == 0
    with pytest.raises(InputError, match="two models"):
        find_twins(_decoder()[:, :1])


def test_divergence_equals_a_loop_over_rows(batch_of: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    analysis = Twins(W_dec_FMD=_decoder(), min_cosine=-2.0)  # all four pairs
    code = torch.rand(300, 5, generator=generator) * (torch.rand(300, 5, generator=generator) > 0.4)
    code *= torch.linspace(0.2, 1, 300)[:, None]  # the maxima grow, so early rows lose their rank
    batches = [batch_of(part, torch.arange(len(part))) for part in code.split(37)]
    table = analysis.table(analyse({"t": analysis}, batches)["t"])
    assert list(table.columns) == [column.name for column in TWIN_COLUMNS]
    assert len(table) == 4
    for _, row in table.iterrows():
        chat, base = int(row["latent_chat"]), int(row["latent_base"])
        a, b = (code[:, j] * _decoder()[j, model].norm() for j, model in ((chat, 1), (base, 0)))
        largest = max(float(a.max()), float(b.max()))
        split = either = 0
        for x, y in zip((a / largest).tolist(), (b / largest).tolist(), strict=True):
            split += (x > 0.4 and y <= 0.1) + (y > 0.4 and x <= 0.1)
            either += x > 0.4 or y > 0.4
        assert row["num_high_rows"] == either
        assert row["divergence"] == pytest.approx(split / either)


def test_divergence_does_not_depend_on_how_code_and_decoder_share_their_scale(batch_of: Callable) -> None:
    generator = torch.Generator().manual_seed(1)
    code = torch.rand(200, 5, generator=generator)
    code[:, 2] = code[:, 0] / 2 + 0.1 * code[:, 2]  # fires with its twin, whose row is half as long

    def divergence(factor: float) -> float:
        W_dec_FMD, scaled = _decoder(), code.clone()
        W_dec_FMD[0] /= factor
        scaled[:, 0] *= factor
        analysis = Twins(W_dec_FMD=W_dec_FMD)
        table = analysis.table(analyse({"t": analysis}, [batch_of(scaled, torch.arange(200))])["t"])
        return float(table["divergence"][0])

    assert divergence(1) < 0.05
    assert divergence(20) == pytest.approx(divergence(1))


def test_twins_on_different_rows_diverge_fully_and_on_the_same_rows_not_at_all(batch_of: Callable) -> None:
    code = torch.zeros(10, 5)
    code[:5, 0] = code[5:, 2] = 1
    analysis = Twins(W_dec_FMD=_decoder())
    apart = analysis.table(analyse({"t": analysis}, [batch_of(code, torch.arange(10))])["t"])
    code[:, 0] = code[:, 2] = 1
    together = analysis.table(analyse({"t": analysis}, [batch_of(code, torch.arange(10))])["t"])
    silent = analysis.table(analysis.start())
    assert apart["divergence"].tolist() == [1.0]
    assert together["divergence"].tolist() == [0.0]
    assert silent["divergence"].isna().all()
