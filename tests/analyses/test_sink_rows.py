from collections.abc import Callable

import pytest
import torch

from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.rows import RowBatch, analyse
from pipeline.analyses.sink_rows import NormHistogram, SinkRows, SinkRule
from pipeline.errors import InputError


def _rule(x_BMD: torch.Tensor, multiple: float = 10.0) -> SinkRule:
    histogram = NormHistogram()
    sums = histogram.start()
    histogram.update(sums, x_BMD)
    return histogram.rule(sums, multiple)


def _planted(batch: RowBatch, *, factor: float = 100.0) -> tuple[RowBatch, torch.Tensor]:
    """Every document's first row `factor` times as long in the base model, every other one in chat as well."""
    is_sink_B = batch.position_B == 0
    x_BMD, xh_BMD = batch.x_BMD.clone(), batch.reconstruction_BMD.clone()
    x_BMD[is_sink_B, 0] *= factor
    x_BMD[is_sink_B & (batch.doc_id_B % 2 == 0), 1] *= factor
    xh_BMD[is_sink_B] = x_BMD[is_sink_B]  # a crosscoder explains what is large
    return batch._replace(x_BMD=x_BMD, reconstruction_BMD=xh_BMD), is_sink_B


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.01, 300.0)])
def test_medians_are_those_of_the_rows_to_a_percent_in_any_order_of_parts(scales: tuple[float, float]) -> None:
    x_BMD = torch.randn(999, 2, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(scales)[:, None]
    x_BMD[5] = float("nan")
    x_BMD[6] = 0
    histogram = NormHistogram()
    merged = histogram.start()
    for part in (x_BMD[600:], x_BMD[:10], x_BMD[10:600]):
        sums = histogram.start()
        histogram.update(sums, part)
        merged = histogram.merge(merged, sums)
    assert int(merged["norms_MK"].sum()) == 2 * 998
    expected = x_BMD.norm(dim=2).nanmedian(0).values
    assert histogram.medians(merged) == pytest.approx(expected.tolist(), rel=0.011)


def test_the_lower_of_two_rows_is_their_median() -> None:
    x_BMD = torch.tensor([1.0, 100.0])[:, None, None].expand(2, 2, 1)
    assert _rule(x_BMD).median_M == pytest.approx((1, 1), rel=0.011)
    assert _rule(x_BMD).is_sink(x_BMD).tolist() == [False, True]


def test_planted_sinks_are_found_and_nothing_else(make_world: Callable) -> None:
    batch, is_sink_B = _planted(make_world(activation_dim=32, num_documents=80).batch())
    rule = _rule(batch.x_BMD)
    assert torch.equal(rule.is_sink(batch.x_BMD), is_sink_B)
    assert torch.equal(rule.is_sink(batch.x_BMD[None]), is_sink_B[None])
    scaled = batch.x_BMD * torch.tensor([1e-3, 50.0])[:, None]
    assert torch.equal(_rule(scaled).is_sink(scaled), is_sink_B)  # each model against its own median
    broken = batch.x_BMD[:1].clone()
    broken[0, 0, 0] = float("inf")
    assert not rule.is_sink(broken).any()


def test_fve_with_sinks_hides_what_fve_without_them_says(make_world: Callable) -> None:
    batch, is_sink_B = _planted(make_world(activation_dim=32, num_documents=80).batch())
    analysis = SinkRows(_rule(batch.x_BMD), activation_dim=32)
    table = analysis.table(analyse({"s": analysis}, [batch])["s"])
    assert (table["num_rows"], table["num_sinks"]) == (len(batch.x_BMD), int(is_sink_B.sum()))
    kept = batch._replace(
        x_BMD=batch.x_BMD[~is_sink_B],
        reconstruction_BMD=batch.reconstruction_BMD[~is_sink_B],
    )
    for suffix, part in (("", batch), ("_without_sinks", kept)):
        x, error = part.x_BMD.double(), part.x_BMD.double() - part.reconstruction_BMD.double()
        variance, left = x.var(0, correction=0), error.var(0, correction=0)
        assert table[f"fve{suffix}_base"] == pytest.approx(float(1 - left[0].sum() / variance[0].sum()), abs=1e-9)
        assert table[f"fve{suffix}"] == pytest.approx(float(1 - left.sum() / variance.sum()), abs=1e-9)
        standardised = 1 - (left / variance).mean(1)
        assert table[f"fve_standardised{suffix}_chat"] == pytest.approx(float(standardised[1]), abs=1e-9)
        assert table[f"fve_standardised{suffix}"] == pytest.approx(float(standardised.mean()), abs=1e-9)
    assert table["fve_base"] > 0.99 > 0.9 > table["fve_without_sinks_base"]
    assert table["sink_variance_frac_base"] > 0.99
    norm = batch.x_BMD[:, 0].norm(dim=1)
    assert table["largest_norm_base"] == pytest.approx(float(norm.max() / norm.median()), rel=0.02)


def test_all_rows_give_the_fve_of_fidelity_and_parts_merge(make_world: Callable) -> None:
    world = make_world()
    batch = world.batch()
    analysis = SinkRows(_rule(batch.x_BMD), activation_dim=6)
    fidelity = Fidelity(activation_dim=6, num_latents=12)
    sums = analyse({"s": analysis, "f": fidelity}, world.batches())
    table, expected = analysis.table(sums["s"]), fidelity.table(sums["f"])
    assert {key: table[key] for key in ("fve", "fve_base", "fve_chat")} == pytest.approx(
        {key: expected[key] for key in ("fve", "fve_base", "fve_chat")}
    )
    assert table["num_sinks"] == 0 == table["sink_frac"]
    assert table["fve_without_sinks"] == table["fve"]
    parts = [analyse({"s": analysis}, [own])["s"] for own in world.batches()]
    merged = analysis.start()
    for part in reversed(parts):
        merged = analysis.merge(merged, part)
    assert analysis.table(merged) == pytest.approx(table)


def test_a_dimension_of_large_variance_does_not_decide_the_standardised_fve() -> None:
    """One dimension of 100 times the spread is explained, 15 are not: FVE near 1, standardised 1 / 16."""
    generator = torch.Generator().manual_seed(0)
    x_BMD = torch.randn(500, 2, 16, generator=generator)
    x_BMD[:, :, 0] *= 100
    xh_BMD = torch.zeros_like(x_BMD)
    xh_BMD[:, :, 0] = x_BMD[:, :, 0]
    from pipeline.numerics.codes import SparseCodes

    zeros = torch.zeros(500, dtype=torch.int64)
    batch = RowBatch(x_BMD, SparseCodes.from_dense(torch.zeros(500, 3)), xh_BMD, zeros, zeros, zeros, zeros, zeros)
    analysis = SinkRows(SinkRule((1e9, 1e9)), activation_dim=16)
    table = analysis.table(analyse({"s": analysis}, [batch])["s"])
    assert table["fve"] > 0.99
    assert table["fve_standardised"] == pytest.approx(1 / 16, abs=1e-6)


def test_wrong_input_is_said() -> None:
    with pytest.raises(InputError, match="got 0"):
        NormHistogram().medians(NormHistogram().start())
    with pytest.raises(InputError, match="got 1"):
        _rule(torch.ones(3, 2, 1), multiple=1)
    with pytest.raises(InputError, match="got 0"):
        SinkRows(SinkRule((1.0, 1.0)), activation_dim=1).table(SinkRows(SinkRule((1.0, 1.0)), activation_dim=1).start())
