from collections.abc import Callable

import pytest
import torch

from pipeline.analyses.fidelity import Fidelity, sinks
from pipeline.analyses.rows import RowBatch, analyse
from pipeline.schema import FIDELITY_KEYS


def _table(batch: RowBatch) -> dict[str, float]:
    fidelity = Fidelity(activation_dim=batch.x_BMD.shape[2], num_latents=batch.codes.num_latents)
    return fidelity.table(analyse({"f": fidelity}, [batch])["f"])


def test_every_number_equals_its_definition(make_world: Callable) -> None:
    batch = make_world().batch()
    table = _table(batch)
    x, error = batch.x_BMD.double(), batch.x_BMD.double() - batch.reconstruction_BMD.double()
    variance, unexplained = x.var(0).sum(1), error.var(0).sum(1)
    code = batch.codes.to_dense()
    expected = {
        "fve_base": 1 - unexplained[0] / variance[0],
        "fve_chat": 1 - unexplained[1] / variance[1],
        "fve": 1 - unexplained.sum() / variance.sum(),
        "l0": (code > 0).sum(1).double().mean(),
        "dead_frac": (code.sum(0) == 0).double().mean(),
        "mean_norm_base": x[:, 0].norm(dim=1).mean(),
        "mean_norm_chat": x[:, 1].norm(dim=1).mean(),
        "num_rows": len(x),
        "fve_standardised": (1 - error.var(0) / x.var(0)).mean(),
        "fve_without_sinks": 1 - unexplained.sum() / variance.sum(),
        "num_sinks": 0,
    }
    assert tuple(table) == FIDELITY_KEYS
    assert table == pytest.approx({key: float(value) for key, value in expected.items()})
    assert table["dead_frac"] >= 1 / 12


def test_perfect_and_mean_reconstructions_explain_all_and_nothing(make_world: Callable) -> None:
    batch = make_world().batch()
    assert _table(batch._replace(reconstruction_BMD=batch.x_BMD))["fve"] == pytest.approx(1)
    mean = batch.x_BMD.mean(0, keepdim=True).expand_as(batch.x_BMD)
    assert _table(batch._replace(reconstruction_BMD=mean))["fve_base"] == pytest.approx(0, abs=1e-6)
    # A constant offset is no variance: FVE compares fluctuations, as in the definition.
    assert _table(batch._replace(reconstruction_BMD=batch.x_BMD + 3))["fve_chat"] == pytest.approx(1)


def test_a_difference_is_explained_as_such_and_no_model_by_itself(make_world: Callable) -> None:
    batch = make_world().batch()
    x, error = batch.x_BMD.double(), batch.x_BMD.double() - batch.reconstruction_BMD.double()
    expected = 1 - (error[:, 1] - error[:, 0]).var(0).sum() / (x[:, 1] - x[:, 0]).var(0).sum()
    fidelity = Fidelity(activation_dim=6, num_latents=12, inputs="difference")
    table = fidelity.table(analyse({"f": fidelity}, [batch])["f"])
    assert table["fve"] == pytest.approx(float(expected))
    assert table["fve_base"] != table["fve_base"] and table["fve_chat"] != table["fve_chat"]
    assert table["mean_norm_chat"] == _table(batch)["mean_norm_chat"]
    sae = Fidelity(activation_dim=6, num_latents=12, inputs="chat")
    table = sae.table(analyse({"f": sae}, [batch])["f"])
    assert table["fve"] == table["fve_chat"] == pytest.approx(_table(batch)["fve_chat"])
    assert table["fve_base"] != table["fve_base"]


def test_fve_is_nan_where_the_activations_are_constant(make_world: Callable) -> None:
    batch = make_world().batch()
    constant = torch.full_like(batch.x_BMD, 100.3)
    table = _table(batch._replace(x_BMD=constant, reconstruction_BMD=constant))
    assert all(table[key] != table[key] for key in ("fve_base", "fve_chat", "fve"))


def test_a_mean_far_above_the_spread_costs_no_accuracy(make_world: Callable) -> None:
    batch = make_world().batch()
    near = _table(batch)["fve"]
    far = _table(
        batch._replace(x_BMD=batch.x_BMD.double() + 1e4, reconstruction_BMD=batch.reconstruction_BMD.double() + 1e4)
    )
    assert far["fve"] == pytest.approx(near, rel=1e-6)


def test_fve_with_sinks_hides_what_fve_without_them_says(make_world: Callable) -> None:
    """Every document's first row is a hundred times as long in one model, and explained, as all that is large is."""
    world = make_world(activation_dim=32, num_documents=80)
    batch = world.batch()
    lengths = torch.bincount(batch.doc_id_B)
    is_sink_B = (batch.position_B == 0) & (lengths[batch.doc_id_B] > 2)  # a median needs more rows than the sink
    x_BMD, xh_BMD = batch.x_BMD.clone(), batch.reconstruction_BMD.clone()
    x_BMD[is_sink_B, 1] *= 100
    xh_BMD[is_sink_B] = x_BMD[is_sink_B]
    planted = batch._replace(x_BMD=x_BMD, reconstruction_BMD=xh_BMD)
    assert torch.equal(sinks(planted), is_sink_B)
    scaled = planted._replace(x_BMD=x_BMD * torch.tensor([1e-3, 50.0])[:, None])
    assert torch.equal(sinks(scaled), is_sink_B)  # each model against its own median
    table = _table(planted)
    x, error = (value[~is_sink_B].double() for value in (x_BMD, x_BMD - xh_BMD))
    expected = 1 - error.var(0, correction=0).sum() / x.var(0, correction=0).sum()
    assert table["num_sinks"] == int(is_sink_B.sum()) > 0
    assert table["fve_without_sinks"] == pytest.approx(float(expected), rel=1e-6)
    assert table["fve"] > 0.95 > 0.5 > table["fve_without_sinks"]


def test_parts_merge_to_the_whole_in_any_order(make_world: Callable) -> None:
    world = make_world()
    fidelity = Fidelity(activation_dim=6, num_latents=12)
    whole = fidelity.table(analyse({"f": fidelity}, [world.batch()])["f"])
    merged = fidelity.start()
    for part in reversed([analyse({"f": fidelity}, [own])["f"] for own in world.batches()]):
        merged = fidelity.merge(merged, part)
    assert fidelity.table(merged) == pytest.approx(whole, rel=1e-9)


def test_a_dimension_of_large_variance_does_not_decide_the_standardised_fve(make_world: Callable) -> None:
    """One dimension of 100 times the spread is explained, five are not: FVE near 1, standardised 1 / 6."""
    batch = make_world().batch()
    x_BMD = torch.randn(batch.x_BMD.shape, generator=torch.Generator().manual_seed(0))
    x_BMD[:, :, 0] *= 100
    xh_BMD = torch.zeros_like(x_BMD)
    xh_BMD[:, :, 0] = x_BMD[:, :, 0]
    table = _table(batch._replace(x_BMD=x_BMD, reconstruction_BMD=xh_BMD))
    assert table["fve"] > 0.99
    assert table["fve_standardised"] == pytest.approx(1 / 6, abs=1e-6)
