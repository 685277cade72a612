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
from pipeline.analyses.verdict import Limits
from pipeline.errors import InputError
from pipeline.schema import CONTROL_COLUMNS, SEED_COLUMNS, Control, Verdict

NAN = float("nan")


def latents(verdicts: list[str], q_values: list[float] | None = None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "latent": np.arange(len(verdicts), dtype=np.int32),
            "verdict": verdicts,
            "p_value": q_values or [0.0] * len(verdicts),
            "q_value": q_values or [0.0] * len(verdicts),
            "num_documents": 40,
            "decoder_norm_base": 0.1,
        }
    )


def test_the_stated_error_is_the_largest_q_value_of_the_called() -> None:
    stated = stated_error(latents([Verdict.CHAT_SPECIFIC] * 3 + [Verdict.SHRINKAGE], [0.001, 0.03, 0.01, 0.9]))
    assert (stated.rate, stated.num_latents) == (0.03, 3)
    assert stated.expected == pytest.approx(0.09)
    assert stated_error(latents([Verdict.CHAT_SPECIFIC] * 2, [0.001, NAN])).rate == 1
    row = controls.stated_row(latents([Verdict.CHAT_SPECIFIC] * 50, [0.04] * 50))
    assert (row["value_low"], row["value"], row["value_high"]) == (0, 0.04, 0.04)
    assert row["note"] == "of 50 chat-specific latents at most 2.0 are expected to be false"
    empty = controls.stated_row(latents([Verdict.SHARED, Verdict.DEAD]))
    assert np.isnan([empty["value"], empty["value_low"], empty["value_high"]]).all()
    assert empty["note"] == "no latent is chat-specific, so none can be wrong"


def test_random_directions_are_counted_as_a_loop_would(make_world: Callable) -> None:
    """Restricting Latent Scaling to some latents changes none of their numbers."""
    world = make_world(num_documents=80)
    batch = world.batch()
    chosen = torch.tensor([2, 5, 7, 11])
    own = torch.nn.functional.normalize(world.crosscoder.W_dec_FMD[:, 1].detach(), dim=1)
    directions = controls.random_directions(own, torch.arange(12), seed=3)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(12))
    torch.testing.assert_close((directions * own).sum(1), torch.zeros(12))
    explained = (directions @ own.T).abs().amax(1) ** 2 + 1e-6
    in_plane = ((own @ own.T) ** 2 + (directions @ own.T) ** 2 - 1).abs().amin(1)
    assert (explained > 0).all() and (in_plane < 1e-4).all()  # the plane of its own direction and another latent's

    def table(**options: object) -> pd.DataFrame:
        analysis = LatentScaling(world.crosscoder, num_resamples=100, **options)  # type: ignore[arg-type]
        return analysis.table(analyse({"s": analysis}, [batch])["s"])

    whole = table(direction_FD=directions)
    part = table(direction_FD=directions[chosen], latents=chosen)
    pd.testing.assert_frame_equal(part, whole.iloc[chosen.tolist()].reset_index(drop=True), rtol=1e-5)
    known = latents([Verdict.CHAT_SPECIFIC] * 3 + [Verdict.SHARED] * 9, [0.01] * 3 + [1.0] * 9)
    row = random_row(known, part, Limits())
    expected = int(((part["nu_eps"] < 0.2) & (part["nu_r"] < 0.5) & (part["p_value"] <= 0.01)).sum())
    assert (row["control"], row["num_latents"], row["expected"]) == (Control.RANDOM, 4, 0.0)
    assert row["value"] == pytest.approx(expected / 4)
    assert row["value_low"] <= row["value"] <= row["value_high"]
    assert "and 1 are called along their own" in row["note"]


def test_a_direction_without_a_ratio_is_a_right_answer_of_the_control() -> None:
    """Nothing there in the chat model either: the share is 0 of all latents, not undefined."""
    undefined = pd.DataFrame({"latent": np.arange(45, dtype=np.int32)})
    undefined[["nu_eps", "nu_r", "nu_act_centred", "p_value"]] = NAN
    undefined.loc[0, ["nu_eps", "nu_r", "p_value"]] = 0.0, 0.0, 0.9  # below both thresholds, but not significantly
    row = random_row(latents([Verdict.CHAT_SPECIFIC] * 45, [0.02] * 45), undefined, Limits())
    assert (row["value"], row["num_latents"]) == (0, 45)
    assert row["value_high"] < 0.1
    assert "0 would be called along another latent's direction (1 have a defined ratio there) and 45" in row["note"]


def test_controls_of_nothing_say_so() -> None:
    """No chat-only latent, no live latent, no latent called: NaN with a reason, never 0."""
    dead = latents([Verdict.DEAD] * 3)
    row = random_row(dead, None, Limits())
    assert np.isnan(row["value"])
    assert row["note"] == "no candidate fires in enough documents"
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
    assert "0.01" in noise["note"] and "all 2 calls" in noise["note"]
    withheld = table.assign(verdict=table["verdict"].replace(Verdict.CHAT_SPECIFIC, Verdict.WITHHELD))
    assert false_calls_row(withheld, noise=0.0)["value"] == 0.5  # the rule has made them all the same


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


def test_a_latent_is_replicated_where_half_of_the_other_seeds_find_it() -> None:
    """Three latents, two other seeds: found by both, by one, by none (once a match that is only shared)."""
    found, shared = Verdict.CHAT_SPECIFIC, Verdict.SHARED
    seeds = pd.DataFrame(
        {
            "other": ["a"] * 3 + ["b"] * 3,
            "latent": [1, 4, 6] * 2,
            "other_verdict": [found, found, shared, found, None, None],
        }
    )
    assert controls.num_seeds_finding(seeds).to_dict() == {1: 2, 4: 1, 6: 0}
    row = controls.replicated_row(seeds)
    assert (row["value"], row["num_latents"]) == (pytest.approx(2 / 3), 3)
    assert np.isnan(controls.replicated_row(seeds.head(0))["value"])


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
