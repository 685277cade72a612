"""Controls against planted truth: the stated error beside the realised one, matches against a permutation, nulls."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.analyses import controls
from pipeline.analyses.controls import false_calls_row, match_latents, random_row, seed_row, seed_table, stated_error
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.rows import analyse
from pipeline.errors import InputError
from pipeline.numerics.statistics import bootstrap_interval, exceedance_probability
from pipeline.schema import CONTROL_COLUMNS, SEED_COLUMNS, Control, Verdict

NAN = float("nan")


def latents(verdicts: list[str], probabilities: list[float] | None = None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "latent": np.arange(len(verdicts), dtype=np.int32),
            "verdict": verdicts,
            "artifact_probability": probabilities or [0.0] * len(verdicts),
            "num_documents": 40,
            "decoder_norm_base": 0.1,
        }
    )


def test_the_stated_error_is_the_mean_probability_of_the_called() -> None:
    table = latents([Verdict.CHAT_SPECIFIC] * 3 + [Verdict.SHRINKAGE], [0.1, 0.3, NAN, 0.9])
    stated = stated_error(table)
    assert stated.expected == pytest.approx(0.1 + 0.3 + 1)
    assert stated.rate == pytest.approx(1.4 / 3)
    spread = (0.1 * 0.9 + 0.3 * 0.7) ** 0.5 / 3
    assert (stated.low, stated.high) == pytest.approx((1.4 / 3 - 2 * spread, 1.4 / 3 + 2 * spread))
    assert stated.num_latents == 3
    empty = controls.stated_row(latents([Verdict.SHARED, Verdict.DEAD]))
    assert np.isnan([empty["value"], empty["value_low"], empty["value_high"]]).all()
    assert empty["note"] == "no latent is chat-specific, so none can be wrong"


def _called(truth_F: torch.Tensor, *, documents: int, spread: float, seed: int) -> tuple[float, float, int]:
    """(stated, realised) false discovery rate and the number called, of latents with these true nu_eps; nu_r is 0."""
    generator = torch.Generator().manual_seed(seed)
    size = (documents, len(truth_F))
    chat_GF = torch.exp(0.5 * torch.randn(size, dtype=torch.float64, generator=generator))
    base_GF, held_GF = (
        chat_GF * (nu_F + spread * torch.randn(size, dtype=torch.float64, generator=generator))
        for nu_F in (truth_F, torch.zeros_like(truth_F))
    )
    probability = exceedance_probability([(base_GF, chat_GF, 0.2), (held_GF, chat_GF, 0.5)], num_resamples=500)
    nu_F = bootstrap_interval(base_GF, chat_GF, num_resamples=100).estimate
    verdicts = np.where(nu_F.numpy() < 0.2, Verdict.CHAT_SPECIFIC, Verdict.SHRINKAGE).tolist()
    stated = stated_error(latents(verdicts, probability.tolist()))
    is_called = nu_F < 0.2
    return stated.rate, float((truth_F[is_called] >= 0.2).double().mean()), int(is_called.sum())


@pytest.mark.parametrize(("documents", "spread"), [(12, 0.3), (40, 0.3), (100, 0.5)])
def test_the_stated_false_discovery_rate_is_the_realised_one(documents: int, spread: float) -> None:
    """Planted latents of every strength in the base model: as many false calls as stated, within a tenth of the set."""
    truth_F = 0.8 * torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stated, realised, num_called = _called(truth_F, documents=documents, spread=spread, seed=documents)
    assert num_called > 500
    assert stated == pytest.approx(realised, abs=0.03)


def test_where_latents_are_new_or_shared_and_little_between_the_stated_rate_errs_on_the_safe_side() -> None:
    generator = torch.Generator().manual_seed(1)
    is_new_F = torch.rand(4000, generator=generator) < 0.5
    truth_F = torch.where(is_new_F, 0.02, 0.7).double()
    stated, realised, _ = _called(truth_F, documents=20, spread=0.5, seed=3)
    assert realised < 0.01
    assert realised <= stated < 0.2


def test_random_directions_are_counted_as_a_loop_would(make_world: Callable) -> None:
    """Restricting Latent Scaling to some latents changes none of their numbers."""
    world = make_world(num_documents=80)
    batch = world.batch()
    chosen = torch.tensor([2, 5, 7, 11])
    own = world.crosscoder.W_dec_FMD[:, 1].detach()
    directions = controls.random_directions(own, seed=3)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(12))
    torch.testing.assert_close((directions * own).sum(1), torch.zeros(12))

    def table(**options: object) -> pd.DataFrame:
        analysis = LatentScaling(world.crosscoder, num_resamples=100, **options)  # type: ignore[arg-type]
        return analysis.table(analyse({"s": analysis}, [batch])["s"])

    whole = table(direction_FD=directions)
    part = table(direction_FD=directions[chosen], latents=chosen)
    pd.testing.assert_frame_equal(part, whole.iloc[chosen.tolist()].reset_index(drop=True), rtol=1e-5)
    row = random_row(latents([Verdict.SHARED] * 12), part, thresholds=(0.2, 0.5), min_documents=10)
    expected = int(((part["nu_eps"] < 0.2) & (part["nu_r"] < 0.5)).sum())
    assert (row["control"], row["num_latents"], row["expected"]) == (Control.RANDOM, 4, 0.0)
    assert row["value"] == pytest.approx(expected / 4)
    assert row["value_low"] <= row["value"] <= row["value_high"]


def test_controls_of_nothing_say_so() -> None:
    """No chat-only latent, no live latent, no latent called: NaN with a reason, never 0."""
    dead = latents([Verdict.DEAD] * 3)
    row = random_row(dead, None, thresholds=(0.2, 0.5), min_documents=10)
    assert np.isnan(row["value"])
    assert row["note"] == "no chat-only latent fires in enough documents"
    assert np.isnan(false_calls_row(dead, noise=0.0)["value"])
    matches = match_latents(torch.randn(3, 2, 4), torch.randn(3, 2, 4), [])
    seeds = seed_table(dead, dead, matches, other="b")
    assert list(seeds.columns) == [column.name for column in SEED_COLUMNS]
    assert np.isnan(seed_row(seeds, dead, other="b", min_cosine=0.7)["value"])


def test_false_calls_of_a_known_null_stand_beside_what_the_verdict_states() -> None:
    table = latents(
        [Verdict.CHAT_SPECIFIC, Verdict.CHAT_SPECIFIC, Verdict.SHARED, Verdict.SHARED, Verdict.DEAD], [0.2] * 5
    )
    null, noise = false_calls_row(table, noise=0.0), false_calls_row(table, noise=0.01)
    assert list(null) == [column.name for column in CONTROL_COLUMNS]
    assert (null["control"], noise["control"]) == (Control.NULL_PAIR, Control.NOISE_PAIR)
    assert null["value"] == noise["value"] == 0.5
    assert null["expected"] == pytest.approx(0.1)
    assert "with noise of 0.01 on its weights: all 2 chat-specific latents are false" in noise["note"]


def test_another_seeds_latents_are_matched_as_they_were_permuted() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec_FMD = torch.randn(20, 2, 16, generator=generator)
    order = torch.randperm(20, generator=generator)
    other_GMD = 3 * W_dec_FMD[order] + 0.3 * torch.randn(20, 2, 16, generator=generator)
    other_GMD[5] = -other_GMD[5]  # its source has no partner any more
    lost = int(order[5])
    matches = match_latents(W_dec_FMD, other_GMD, list(range(20)))
    inverse = order.argsort()
    assert [int(partner) for j, partner in enumerate(matches.partner) if j != lost] == [
        int(inverse[j]) for j in range(20) if j != lost
    ]
    assert matches.partner[lost] == -1
    assert (matches.cosine[matches.partner >= 0] > 0.9).all()
    back = match_latents(other_GMD, W_dec_FMD, list(range(20)))
    assert all(int(back.partner[partner]) == j for j, partner in enumerate(matches.partner.tolist()) if partner >= 0)
    with pytest.raises(InputError, match="match crosscoders of the same activations"):
        match_latents(W_dec_FMD, other_GMD[:, :, :8], [0])


def test_the_jaccard_index_counts_a_matched_pair_once() -> None:
    called, shared = Verdict.CHAT_SPECIFIC, Verdict.SHARED
    one, two = latents([called, called, called, shared]), latents([shared, called, called, called])
    W_dec_FMD = torch.eye(4)[:, None].repeat(1, 2, 1)  # latent j matches latent j
    seeds = seed_table(one, two, match_latents(W_dec_FMD, W_dec_FMD, [0, 1, 2]), other="second")
    assert seeds["other_latent"].tolist() == [0, 1, 2]
    assert seeds["other_verdict"].tolist() == [shared, called, called]
    row = seed_row(seeds, two, other="second", min_cosine=0.7)
    assert row["value"] == pytest.approx(2 / 4)  # {1, 2} of {0, 1, 2} and {1, 2, 3}
    assert row["control"] == "seed second"
    assert row["num_latents"] == 4
