"""The numbers of the first page and the terminal, each against a count or formula made here by hand."""

import dataclasses
import math
import re

import pandas as pd
import pytest

from pipeline import schema
from pipeline.errors import ArtifactError
from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.headlines import control_sentences, does_sentences, headline
from pipeline.report.summary import (
    causal_summary,
    corpora_of,
    difference_of,
    equivalents,
    half_way,
    num_template_latents,
    planted_rows,
    replication,
    steering_effects,
    verdict_summary,
)
from pipeline.report.verdict import verdict_table, verdict_text
from pipeline.schema import Verdict


def table_of(verdicts: list[tuple[str, bool]]) -> pd.DataFrame:
    rows = [
        dict.fromkeys((column.name for column in schema.LATENT_COLUMNS), 0.1)
        | {"latent": index, "verdict": verdict, "is_confident": confident, "ownership": "chat-only"}
        for index, (verdict, confident) in enumerate(verdicts)
    ]
    return pd.DataFrame(rows, columns=[column.name for column in schema.LATENT_COLUMNS])


VERDICTS = [
    (Verdict.CHAT_SPECIFIC, True),
    (Verdict.CHAT_SPECIFIC, True),
    (Verdict.CHAT_SPECIFIC, False),
    (Verdict.SHRINKAGE, True),
    (Verdict.DECOUPLING, False),
    (Verdict.UNDECIDED, False),
    (Verdict.SHARED, False),
    (Verdict.DEAD, False),
]


def test_counts_and_their_range_follow_from_verdict_and_confidence() -> None:
    counts = verdict_summary(table_of(VERDICTS))
    assert (counts.num_latents, counts.num_alive, counts.num_chat_only) == (8, 7, 6)
    assert counts.num_chat_only_by_norm == 6  # all of the table's latents are chat-only by norm
    assert (counts.num_specific, counts.num_artifacts) == (3, 2)
    # At worst the two confident ones; at best all but the one confident artifact.
    assert (counts.num_confident_specific, counts.most_specific) == (2, 5)


def test_headline_names_count_denominator_and_range() -> None:
    text = headline(CrosscoderReport(name="a", kind="l1", latents=table_of(VERDICTS)))
    assert text.number == "3"
    assert "Out of 6 " in text.new
    assert "between 2 and 5" in text.new
    assert "2 of 6 (33%) are artifacts" in " ".join(text.sure)
    assert "1 fires too rarely" in " ".join(text.sure)


def test_headline_of_an_empty_chat_only_set_says_so() -> None:
    text = headline(CrosscoderReport(name="a", kind="l1", latents=table_of([(Verdict.SHARED, False)] * 4)))
    assert text.number == "0"
    assert "None of the 4 live latents" in text.new


def test_headline_without_latent_scaling_claims_nothing() -> None:
    table = table_of([(Verdict.UNDECIDED, False)] * 3).assign(beta_error_chat=math.nan, nu_eps=math.nan)
    text = headline(CrosscoderReport(name="a", kind="l1", latents=table))
    assert text.number == "3"
    assert "untested" in text.label
    assert "Latent Scaling was not run" in text.new


def test_steering_effect_is_the_best_positive_scale_with_its_controls() -> None:
    rows = [
        ("refusal", -1, "none", 0.0, 0.1, 1.0),
        ("refusal", 7, "latent", -4.0, 0.95, 3.0),
        ("refusal", 7, "latent", 1.0, 0.6, 1.1),
        ("refusal", 7, "latent", 2.0, 0.9, 1.3),
        ("refusal", 7, "latent", 4.0, 0.9, 2.0),
        ("refusal", 0, "random", 2.0, 0.1, 1.4),
        ("refusal", 1, "random", 2.0, 0.3, 1.4),
        ("refusal", 0, "random", 4.0, 0.8, 1.4),
    ]
    table = pd.DataFrame(rows, columns=["behavior", "latent", "control", "scale", "rate", "nll"]).assign(num_prompts=20)
    table = table.assign(model="chat", positions=table["control"].map({"none": "none"}).fillna("all"))
    others = [
        table.assign(model="base", rate=1.0),
        table[table["control"] == "latent"].assign(positions="prompt", rate=1.0),
    ]
    (effect,) = steering_effects(pd.concat([table, *others]))
    assert (effect.latent, effect.scale, effect.rate, effect.num_scales) == (7, 2.0, 0.9, 3)
    assert effect.random_mean == pytest.approx(0.2)
    assert (effect.random_max, effect.num_random) == (0.3, 2)
    assert effect.unsteered_rate == pytest.approx(0.1)


def test_causal_summary_is_the_share_of_kl_removed(report: ReportData) -> None:
    summary = causal_summary(report.crosscoders[0].causality)
    assert summary is not None
    assert summary.removed_frac == pytest.approx(1 - 0.41)
    assert causal_summary(None) is None


def test_planted_rows_join_the_three_candidates(report: ReportData) -> None:
    rows = planted_rows(report.crosscoders[1].planted)
    assert [row.behavior for row in rows] == ["refusal_harm", "refusal_secret", "correction", "personal"]
    assert rows[0].specific.auroc == pytest.approx(0.985)
    assert rows[0].mean_difference.auroc == pytest.approx(0.78)


def test_behaviours_that_no_chat_specific_latent_finds_are_said_with_what_does(report: ReportData) -> None:
    crosscoder = report.crosscoders[1]
    assert crosscoder.planted is not None
    table = crosscoder.planted.copy()
    is_missed = table["behavior"].isin(["correction", "personal"])
    table.loc[is_missed & (table["candidate"] == "chat-specific latent"), "auroc"] = 0.5
    table.loc[is_missed & (table["candidate"] == "any latent"), "auroc"] = [0.95] * 3 + [0.7] * 3
    said = " ".join(does_sentences(dataclasses.replace(crosscoder, planted=table)))
    assert "finds 2 of 4" in said
    assert "Of the 2 that none finds, a latent of another verdict finds 1, the mean difference 0" in said
    assert "a linear probe of the chat model 2." in said


def test_verdict_text_holds_counts_shares_scores_and_effects(report: ReportData) -> None:
    text = verdict_text(report)
    lines = text.splitlines()
    assert lines[0] == "demo: organism/base (base) against organism/chat (chat), layer 3 (of 6, counted from 0)"
    for crosscoder in report.crosscoders:
        assert crosscoder.latents is not None
        counts = verdict_summary(crosscoder.latents)
        assert f"{counts.num_specific} ({counts.num_confident_specific})" in text
        shrunk = counts.by_verdict[Verdict.SHRINKAGE]
        assert f"{shrunk} ({100 * shrunk / counts.num_chat_only:.0f}%)" in text
    assert "0.872 / 0.879" in text
    assert re.search(
        r"refusal_harm +batchtopk +\d+ +0\.98 \[0\.97, 1\.00\] +0\.98 +0\.98 +\d+% -> \d+% \(random \d+%\)", text
    )
    assert text.isascii()
    assert max(len(line) for line in lines) <= 100
    assert not any(line.endswith(" ") for line in lines)


def test_verdict_table_has_one_column_per_crosscoder(report: ReportData, bare_report: ReportData) -> None:
    assert {len(row) for row in verdict_table(report.crosscoders)} == {3}
    assert verdict_table(report.crosscoders)[0] == ["", "l1", "batchtopk"]
    assert {cell for row in verdict_table(bare_report.crosscoders)[1:] for cell in row[1:]} == {fmt.DASH}


def test_verdict_text_of_a_run_without_crosscoders_is_only_a_header(report: ReportData) -> None:
    text = verdict_text(dataclasses.replace(report, crosscoders=[]))
    assert "chat-specific" in text


def test_a_table_without_a_column_is_refused_by_name(report: ReportData) -> None:
    latents = report.crosscoders[0].latents
    assert latents is not None
    with pytest.raises(ArtifactError, match=r"table latents of crosscoder 'x'.*without nu_eps"):
        CrosscoderReport(name="x", kind="l1", latents=latents.drop(columns="nu_eps"))


def test_fidelity_without_a_key_is_refused_by_name() -> None:
    with pytest.raises(ArtifactError, match=r"fidelity of crosscoder 'x'.*without l0"):
        CrosscoderReport(name="x", kind="l1", fidelity={key: 1.0 for key in schema.FIDELITY_KEYS if key != "l0"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fmt.count(62373), "62,373"),
        (fmt.count(None), fmt.DASH),
        (fmt.percent(0.0481), "4.8%"),
        (fmt.percent(0.6), "60%"),
        (fmt.percent(0.00004), "0.004%"),
        (fmt.percent(math.nan), fmt.DASH),
        (fmt.significant(0.04812), "0.0481"),
        (fmt.significant(4810.2), "4,810"),
        (fmt.significant(2.5e-7), "2.50e-07"),
        (fmt.significant(math.inf), "inf"),
        (fmt.interval(0.1, math.nan), ""),
        (fmt.plural(1, "latent"), "1 latent"),
        (fmt.plural(1204, "latent"), "1,204 latents"),
        (fmt.setting([0.5, True, None]), f"0.5, yes, {fmt.DASH}"),
    ],
)
def test_numbers_are_written_one_way(text: str, expected: str) -> None:
    assert text == expected


def test_a_paired_difference_is_found_and_judged(report: ReportData) -> None:
    table = report.crosscoders[1].causality_differences
    found = difference_of(table, "worst_half_replace", "best_half_replace")
    assert found is not None
    assert found == pytest.approx((0.13, 0.11, 0.15))
    assert found.is_clear
    unclear = difference_of(report.crosscoders[0].causality_differences, "worst_half_replace", "best_half_replace")
    assert unclear is not None
    assert not unclear.is_clear
    assert difference_of(table, "worst_half_add", "best_half_add") is None
    assert difference_of(None, "a", "b") is None


def curve(**orders: list[float]) -> pd.DataFrame:
    """KL at 0, 1, 2, 4 and 8 latents for each order."""
    rows = [
        {"order": order, "positions": "all", "num_latents": size, "kl": kl}
        for order, values in orders.items()
        for size, kl in zip((0, 1, 2, 4, 8), values, strict=True)
    ]
    return pd.DataFrame(rows)


def test_half_of_the_work_is_counted_in_latents() -> None:
    orders = {"evidence": [1.0, 0.8, 0.5, 0.3, 0.2], "random_0": [1.0, 0.9, 0.8, 0.7, 0.2]}
    table = curve(**orders, random_1=[1.0, 1.0, 1.0, 0.5, 0.2])
    assert half_way(table) == (2, 6.0, 8)
    only = half_way(table[table["order"] == "evidence"])
    assert only is not None
    assert math.isnan(only.num_random)
    assert half_way(curve(evidence=[1.0, 1.1, 1.1, 1.1, 1.2])) is None
    assert half_way(None) is None


def test_controls_become_sentences_and_undefined_ones_none(report: ReportData) -> None:
    table = report.crosscoders[1].controls
    assert table is not None
    sentences = control_sentences(table)
    assert sentences[0] == "At most 1.3 of the 26 are expected to be false (5.0%, Benjamini-Hochberg)."
    assert (
        sentences[1]
        == "With other latents' directions in place of their own, 1 of 36 would have passed (2.8% [0%, 14%])."
    )
    (sentence,) = control_sentences(table.head(1).assign(value=0.0, value_low=0.0, value_high=0.0, num_latents=4))
    assert sentence.startswith("At most 0.0 of the 4 are expected to be false (0%")
    assert sentences[2] == "Training again with another seed (batchtopk_seed1) finds the same set to 71% [52%, 85%]."
    pair = table[1:2].assign(control="null pair", value=0.002, value_low=0.0, value_high=0.01)
    (sentence,) = control_sentences(pair)
    assert sentence == "This is a null pair: every chat-specific latent is false, 0.2% [0%, 1.0%] of all."
    assert control_sentences(pair.assign(value=math.nan)) == []
    assert control_sentences(None) == []


def test_template_latents_and_corpora_by_hand() -> None:
    table = table_of([(Verdict.CHAT_SPECIFIC, True)] * 4 + [(Verdict.SHARED, False)] * 2)
    table = table.assign(template_frac=[0.6, 0.5, 0.9, 0.1, 0.9, 0.9], frequency_web=0.1, frequency_chat=math.nan)
    assert num_template_latents(table) == 2
    assert corpora_of(table) == ["web", "chat"]


def test_a_difference_shows_its_own_variance_explained(report: ReportData) -> None:
    first, *others = report.crosscoders
    assert first.fidelity is not None
    fidelity = {**first.fidelity, "fve_base": math.nan, "fve_chat": math.nan, "fve": 0.617}
    changed = dataclasses.replace(report, crosscoders=(dataclasses.replace(first, fidelity=fidelity), *others))
    assert "0.617 (difference)" in verdict_text(changed)


def test_the_table_says_how_many_latents_other_seeds_find_again(report: ReportData) -> None:
    """Of the eight chat-specific latents in the table of seeds every second one has a match, which is called too."""
    found = replication(report.crosscoders[0])
    assert found is not None
    assert (found.num_replicated, found.num_others) == (4, 1)
    assert sorted(found.num_finding.values()) == [0] * 4 + [1] * 4
    (row,) = [row for row in verdict_table(report.crosscoders) if "other seeds" in row[0]]
    assert row[1].startswith("4 ")
    alone = [dataclasses.replace(one, seeds=None) for one in report.crosscoders]
    assert not any("other seeds" in row[0] for row in verdict_table(alone))


def test_shared_latents_that_do_the_same_are_counted(report: ReportData) -> None:
    specific, shared = equivalents(report.crosscoders[0].equivalence)
    assert specific == (Verdict.CHAT_SPECIFIC, 0, 4)
    assert shared == (Verdict.SHARED, 5, 5)  # the sixth has no agreement
    assert any("5 of 5 shared" in sentence for sentence in headline(report.crosscoders[0]).does)
    assert equivalents(None) == []
