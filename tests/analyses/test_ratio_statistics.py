"""Statistics over ratios against scipy-free closed forms, brute force and planted tables."""

import numpy as np
import pandas as pd
import pytest

from pipeline.analyses.ratio_statistics import correlation, matched_shared, ratio_statistics
from pipeline.schema import CHECKED_NU_COLUMNS, GAIN_COLUMNS, Ownership, Verdict


def latents(**columns: object) -> pd.DataFrame:
    number = len(next(iter(columns.values())))  # type: ignore[arg-type]
    table = {"latent": np.arange(number), "verdict": Verdict.SHARED, "ownership": Ownership.SHARED, "frequency": 0.01}
    table |= dict.fromkeys(["delta_norm", "nu_eps", "nu_r"], np.nan)
    table |= {column.name: np.nan for column in (*GAIN_COLUMNS, *CHECKED_NU_COLUMNS)}
    return pd.DataFrame(table | columns)


def value(table: pd.DataFrame, *key: str) -> "pd.Series[float]":
    return table.set_index(["latents", "quantity", "statistic"]).loc[key]


def test_correlations_have_fishers_interval_over_the_live_latents_in_range() -> None:
    x, y = np.arange(8) / 8, np.array([0.1, 0.0, 0.4, 0.2, 0.5, 0.45, 0.9, 9.0])
    verdict = [Verdict.SHARED] * 7 + [Verdict.DEAD]
    table = ratio_statistics(latents(delta_norm=x, nu_eps=y, nu_r=np.append(y[:6], [np.nan, 3.0]), verdict=verdict))
    own_x, own_y = x[:7], y[:7]
    r = ((own_x - own_x.mean()) * (own_y - own_y.mean())).mean() / own_x.std() / own_y.std()
    row = value(table, "live", "nu_eps", "pearson")
    assert row["value"] == pytest.approx(r) and row["num_latents"] == 7
    z = 0.5 * np.log((1 + r) / (1 - r))
    ends = [np.tanh(z + sign * 1.959963984540054 / np.sqrt(4)) for sign in (-1, 1)]
    assert [row["value_low"], row["value_high"]] == pytest.approx(ends)
    # Ranks of y: 2, 1, 4, 3, 6, 5, 7 beside 1 .. 7: 1 - 6 sum d^2 / (n (n^2 - 1)).
    assert value(table, "live", "nu_eps", "spearman")["value"] == pytest.approx(1 - 6 * 6 / (7 * 48))
    assert value(table, "live", "nu_r", "pearson")["num_latents"] == 6  # undefined, and beyond the range
    assert np.isnan(value(table, "chat-only", "nu_eps", "pearson")["value"])


def test_a_correlation_of_one_or_of_a_constant_is_no_accident() -> None:
    x = pd.Series([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, 2 * x) == (pytest.approx(1), pytest.approx(1), pytest.approx(1), 4)
    assert np.isnan(correlation(x, 0 * x)[:3]).all() and np.isnan(correlation(x[:3], x[:3])[0])


def test_matched_shared_latents_are_the_nearest_in_frequency_and_none_comes_twice() -> None:
    frequency = [0.1, 0.1, 0.001, 0.2, 0.09, 0.0012, 0.01, 0.5]
    ownership = [Ownership.CHAT_ONLY] * 3 + [Ownership.SHARED] * 5
    nu_eps = [0.0, 0.0, 0.0, 1.0, 1.1, 0.9, 1.2, np.nan]
    matched = matched_shared(latents(frequency=frequency, ownership=ownership, nu_eps=nu_eps), "nu_eps")
    assert matched["latent"].tolist() == [4, 3, 5]  # 0.1 -> 0.09, then 0.2; 0.001 -> 0.0012
    few = latents(frequency=frequency[:4], ownership=ownership[:4], nu_eps=nu_eps[:4])
    assert matched_shared(few, "nu_eps")["latent"].tolist() == [3]


def test_the_share_inside_the_matched_shared_latents_is_counted() -> None:
    shared, own = np.linspace(0.8, 1.2, 200), np.array([0.0, 0.1, 0.802, 0.9, 1.0])
    table = ratio_statistics(
        latents(
            nu_eps=np.concatenate([own, np.repeat(shared, 1)]),
            ownership=[Ownership.CHAT_ONLY] * 5 + [Ownership.SHARED] * 200,
            frequency=np.concatenate([np.full(5, 0.01), np.full(200, 0.01)]),
        )
    )
    matched = value(table, "chat-only", "nu_eps", "median of matched shared")
    chosen = matched_shared(
        latents(nu_eps=np.concatenate([own, shared]), ownership=[Ownership.CHAT_ONLY] * 5 + [Ownership.SHARED] * 200),
        "nu_eps",
    )["nu_eps"]
    assert [matched["value_low"], matched["value_high"]] == pytest.approx(list(np.quantile(chosen, [0.025, 0.975])))
    inside = ((own >= matched["value_low"]) & (own <= matched["value_high"])).mean()
    assert value(table, "chat-only", "nu_eps", "within matched shared")["value"] == pytest.approx(inside)
    assert value(table, "chat-only", "nu_eps", "median")["value"] == pytest.approx(0.802)


def test_held_out_betas_and_ratios_on_other_rows_are_compared() -> None:
    table = ratio_statistics(
        latents(
            ownership=[Ownership.CHAT_ONLY] * 3 + [Ownership.SHARED],
            gain_error_base=[0.9, -0.1, np.nan, 1.0],
            nu_eps=[0.1, 0.2, 0.3, 1.0],
            nu_eps_training=[0.15, 0.2, 0.2, np.nan],
        )
    )
    own = value(table, "chat-only", "beta_error_base", "helps on other documents")
    assert own["value"] == 0.5 and own["num_latents"] == 2
    assert value(table, "live", "beta_error_base", "helps on other documents")["value"] == pytest.approx(2 / 3)
    difference = value(table, "chat-only", "nu_eps_training", "median difference")
    assert difference["value"] == pytest.approx(0) and difference["num_latents"] == 3
    assert "nu_r_strong" not in set(table["quantity"])
