from collections.abc import Callable

import pytest
import torch

from pipeline.analyses.fidelity import Fidelity
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
    fidelity = Fidelity(activation_dim=6, num_latents=12, is_difference=True)
    table = fidelity.table(analyse({"f": fidelity}, [batch])["f"])
    assert table["fve"] == pytest.approx(float(expected))
    assert table["fve_base"] != table["fve_base"] and table["fve_chat"] != table["fve_chat"]
    assert table["mean_norm_chat"] == _table(batch)["mean_norm_chat"]


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
