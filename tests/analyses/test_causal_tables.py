"""Tables of made-up sums against plain arithmetic: paired differences, their intervals, and curves."""

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.analyses.causal_tables import POSITION_SETS, Bootstrap, CausalTables, causal_tables, contrasts
from pipeline.analyses.interventions import Baselines, Intervention, plan_curve, plan_interventions
from pipeline.analyses.latent_sets import causality_latents
from pipeline.schema import CAUSALITY_COLUMNS, CAUSALITY_CURVE_COLUMNS, CAUSALITY_DIFFERENCE_COLUMNS, Ownership

NUM_CONVERSATIONS = 40


def _chosen(num_latents: int) -> pd.DataFrame:
    latent = np.arange(num_latents)
    table = {"latent": latent, "ownership": Ownership.CHAT_ONLY, "delta_norm": 1 - latent / 1e3}
    table |= {"nu_act": 0.1, "decoder_norm_base": 0.1, "frequency": 0.1}
    return causality_latents(pd.DataFrame({**table, "nu_eps": latent / 1e3, "nu_r": latent / 1e3}))


def _plan(num_latents: int = 5) -> tuple[Intervention, ...]:
    chosen = _chosen(num_latents)
    return (*plan_interventions(chosen, baselines=Baselines(torch.ones(3))), *plan_curve(chosen))


def _sums(plan: tuple[Intervention, ...]) -> dict[str, torch.Tensor]:
    """Conversations that differ far more from each other than interventions do within one of them."""
    generator = torch.Generator().manual_seed(0)
    tokens_GS = torch.randint(1, 30, (NUM_CONVERSATIONS, len(POSITION_SETS)), generator=generator).double()
    level_G11 = 5 * torch.rand(NUM_CONVERSATIONS, 1, 1, generator=generator, dtype=torch.float64)
    effect_I1 = torch.linspace(1, 0, len(plan), dtype=torch.float64)[:, None]
    noise_GIS = 0.1 * torch.rand(NUM_CONVERSATIONS, len(plan), 3, generator=generator, dtype=torch.float64)
    kl_GIS = (level_G11 + effect_I1 + noise_GIS) * tokens_GS[:, None]
    return {"kl_GIS": kl_GIS, "kl_base_GIS": 2 * kl_GIS, "nll_GIS": 3 * kl_GIS, "tokens_GS": tokens_GS}


def _tables(plan: tuple[Intervention, ...], sums: dict[str, torch.Tensor]) -> CausalTables:
    return causal_tables(plan, sums, num_latents=100, bootstrap=Bootstrap(400))


def test_differences_are_differences_of_means_with_narrower_intervals() -> None:
    plan, sums = _plan(), _sums(_plan())
    tables = _tables(plan, sums)
    assert list(tables.differences.columns) == [column.name for column in CAUSALITY_DIFFERENCE_COLUMNS]
    assert list(tables.kl.columns) == [column.name for column in CAUSALITY_COLUMNS]
    assert len(tables.kl) == 3 * sum(not item.order for item in plan)
    for name, factor in (("kl_base", 2), ("nll", 3)):
        for end in ("", "_low", "_high"):
            np.testing.assert_allclose(tables.kl[f"{name}{end}"], factor * tables.kl[f"kl{end}"], rtol=1e-5)
    kl = tables.kl.set_index(["intervention", "positions"])["kl"]
    differences = tables.differences.set_index(["intervention", "reference", "positions"])
    for kind in ("replace", "add"):
        drawn = [f"random_half_{i}_{kind}" for i in range(2)]
        for suffix in ("", "_by_delta_norm"):
            row = differences.loc[(f"worst_half_{kind}{suffix}", f"best_half_{kind}{suffix}", "rest")]
            expected = kl[f"worst_half_{kind}{suffix}", "rest"] - kl[f"best_half_{kind}{suffix}", "rest"]
            assert row["difference"] == pytest.approx(expected)
        mean = np.mean([kl[name, "all"] for name in drawn])
        row = differences.loc[(f"random_half_mean_{kind}", f"best_half_{kind}", "all")]
        assert row["difference"] == pytest.approx(mean - kl[f"best_half_{kind}", "all"])
        assert (drawn[0], f"best_half_{kind}", "all") in differences.index
        assert (f"worst_half_{kind}", drawn[1], "first_9") in differences.index
    closed = differences.loc[("none", "all", "all")]
    assert closed["difference"] == pytest.approx(kl["none", "all"] - kl["all", "all"])
    assert ("mean_difference", "all", "all") in differences.index
    assert ("none", "chat", "all") not in differences.index
    # Interventions differ by 0.1 of noise within a conversation and by 5 between them; pairing removes the latter.
    own = tables.kl.set_index(["intervention", "positions"]).loc[("all", "all")]
    assert closed["difference_high"] - closed["difference_low"] < 0.1 * (own["kl_high"] - own["kl_low"])
    assert closed["difference_low"] < closed["difference"] < closed["difference_high"]


def test_the_interval_of_a_difference_is_a_bootstrap_over_conversations() -> None:
    plan, sums = _plan(), _sums(_plan())
    row = _tables(plan, sums).differences.set_index(["intervention", "reference", "positions"]).loc[
        ("none", "all", "all")
    ]  # fmt: skip
    place = {item.name: i for i, item in enumerate(plan)}
    value_G = (sums["kl_GIS"][:, place["none"], 0] - sums["kl_GIS"][:, place["all"], 0]).numpy()
    tokens_G = sums["tokens_GS"][:, 0].numpy()
    generator = np.random.default_rng(0)
    drawn = generator.integers(NUM_CONVERSATIONS, size=(4000, NUM_CONVERSATIONS))
    ratio = value_G[drawn].sum(1) / tokens_G[drawn].sum(1)
    low, high = np.quantile(ratio, [0.025, 0.975])
    assert row["difference_low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert row["difference_high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_curves_say_what_each_added_latent_took_off_the_kl() -> None:
    plan, sums = _plan(), _sums(_plan())
    curve = _tables(plan, sums).curve
    assert list(curve.columns) == [column.name for column in CAUSALITY_CURVE_COLUMNS]
    one = curve[(curve["order"] == "evidence") & (curve["positions"] == "all")]
    assert one["num_latents"].tolist() == [0, 1, 2, 4, 5]
    kl, per_latent = one["kl"].to_numpy(), one["kl_per_latent"].to_numpy()
    assert np.isnan(per_latent[0])
    np.testing.assert_allclose(per_latent[1:], (kl[:-1] - kl[1:]) / np.array([1, 1, 2, 1]))
    assert (one["kl_per_latent_low"][1:] <= per_latent[1:]).all()
    assert set(curve["order"]) == {"evidence", "random_0"}


def test_an_empty_set_gives_a_curve_of_one_point_and_differences_of_zero() -> None:
    plan = _plan(0)
    sums = _sums(plan)
    for i, item in enumerate(plan):  # what Causality.update measures once for all empty sets
        if not item.latents and item.kind in ("replace", "add"):
            sums["kl_GIS"][:, i] = sums["kl_GIS"][:, 0]
    tables = _tables(plan, sums)
    assert tables.curve["num_latents"].tolist() == [0] * 6
    differences = tables.differences.set_index(["intervention", "reference", "positions"])["difference"]
    assert differences["worst_half_replace", "best_half_replace", "all"] == 0
    assert (tables.kl[tables.kl["intervention"] == "best_half_replace"]["num_latents"] == 0).all()


def test_a_single_random_half_has_no_mean_and_missing_sides_no_contrast() -> None:
    names = [
        (one.intervention, one.reference) for one in contrasts(plan_interventions(_chosen(4), num_random_halves=1))
    ]
    assert ("random_half_0_add", "best_half_add") in names
    assert not any("mean" in name for pair in names for name in pair)
    assert contrasts([Intervention("chat", "chat")]) == []
