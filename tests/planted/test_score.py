"""Precision, recall and intervals on tables small enough to count by hand."""

import math

import pandas as pd
import pytest
import torch

from pipeline.numerics.crosscoder import Crosscoder
from pipeline.planted.pair import label_score
from pipeline.planted.score import RULES, mean_interval, score_row, score_text, trial_score
from pipeline.planted.trial import matched

TRUTH = ["chat-only", "chat-only", "shared", "half-present", "base-only"]


def table(rows: list[tuple[int, float, bool]]) -> pd.DataFrame:
    """(concept, cosine, called)."""
    return pd.DataFrame(
        {
            "concept": [row[0] for row in rows],
            "cosine": [row[1] for row in rows],
            "truth": [TRUTH[row[0]] for row in rows],
            "q_value": [0.01 * (place + 1) for place in range(len(rows))],
            **{rule: [row[2] for row in rows] for rule in RULES},
        }
    )


def test_precision_counts_latents_and_recall_counts_concepts() -> None:
    rows = [(0, 0.9, True), (0, 0.8, True), (2, 0.95, True), (3, 0.7, True), (1, 0.69, True), (1, 0.99, False)]
    score = trial_score(table(rows), "by_delta_norm", TRUTH, min_cosine=0.7)
    assert score.precision == 2 / 5 and score.recall == 1 / 2 and score.num_called == 5
    assert score.wrong == {"shared": 1, "half-present": 1, "rotated": 0, "loose": 0, "nothing": 1}
    assert math.isnan(score.stated)  # decoder norms state no error
    assert trial_score(table(rows), "by_evidence", TRUTH, min_cosine=0.7).stated == 0.05  # of the last called one


def test_where_nothing_is_new_every_call_is_wrong() -> None:
    score = trial_score(table([(2, 0.9, True)]), "by_evidence", TRUTH[2:], min_cosine=0.7)
    assert score.precision == 0 and math.isnan(score.recall)


def test_nothing_called_has_no_precision_and_finds_nothing() -> None:
    score = trial_score(table([(0, 0.9, False)]), "by_delta_norm", TRUTH, min_cosine=0.7)
    assert math.isnan(score.precision) and score.recall == 0 and score.num_called == 0
    row = score_row([score, score], [{"l0": 1.0, "fve": 0.5}] * 2, data="d", recipe="r", rule="by_delta_norm")
    assert math.isnan(row["precision"]) and row["recall"] == 0 and row["num_trials"] == 2
    assert " - " in score_text(pd.DataFrame([row])).splitlines()[-1]


def test_the_interval_is_students() -> None:
    values = [0.9, 0.8, 0.85, 0.95, 0.7]
    mean, low, high = mean_interval(values, [9] * 5)
    half = 2.776445 * 0.0961769 / 5**0.5  # t of 4 degrees of freedom, standard deviation of the five
    assert (mean, low, high) == pytest.approx((0.84, 0.84 - half, 0.84 + half), abs=1e-4)
    assert mean_interval([1.0, 1.0, 0.4], [9] * 3)[2] == 1.0
    assert mean_interval([0.5, math.nan], [9, 0])[0] == 0.5 and math.isnan(mean_interval([0.5], [9])[1])


def test_trials_that_all_agree_are_not_certain() -> None:
    # Clopper-Pearson for 30 of 30 and 0 of 30: 0.8843 and 0.1157.
    assert mean_interval([1.0, 1.0, math.nan], [10, 20, 0]) == pytest.approx((1.0, 0.8843, 1.0), abs=1e-4)
    assert mean_interval([0.0, 0.0], [10, 20]) == pytest.approx((0.0, 0.0, 0.1157), abs=1e-4)


def test_a_latent_is_matched_by_its_chat_decoder_with_a_concept_that_the_chat_model_has() -> None:
    direction_CMD = torch.zeros(5, 2, 4)
    direction_CMD[[0, 1, 2, 3], 1, [0, 1, 2, 3]] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    direction_CMD[4, 0, 0] = 5.0  # base-only: no chat direction to be like
    crosscoder = Crosscoder(4, 2, 4)
    with torch.no_grad():
        crosscoder.W_dec_FMD[0, 1] = torch.tensor([3.0, 0, 0, 0])
        crosscoder.W_dec_FMD[1, 1] = torch.tensor([-1.0, 0.5, 0, 0])
        crosscoder.W_dec_FMD[2, 0] = torch.tensor([1.0, 0, 0, 0])
    calls = table([(0, 0.0, True)] * 3 + [(0, 0.0, False)])[[*RULES]].assign(
        latent=range(4), by_latent_scaling=False, q_value=0.0
    )
    found = matched(crosscoder, calls, direction_CMD, TRUTH)
    assert found["concept"].tolist() == [0, 1, -1, -1]
    assert found["cosine"][0] == pytest.approx(1) and found["cosine"][1] == pytest.approx(0.5 / 1.25**0.5)
    assert found["by_delta_norm"].tolist() == [True, True, True, False]
    assert not found["by_latent_scaling"].any()


def test_labels_of_a_pair_are_found_by_auroc() -> None:
    auroc_FL = torch.tensor([[0.95, 0.5, 0.5], [0.96, 0.4, 0.5], [0.5, 0.89, 0.5], [0.5, 0.99, torch.nan]])
    score = label_score(auroc_FL, torch.tensor([True, True, True, False]))
    assert score.precision == pytest.approx(2 / 3) and score.recall == pytest.approx(1 / 3)
    assert score.wrong["nothing"] == 1
    assert label_score(auroc_FL, torch.zeros(4, dtype=torch.bool)).num_called == 0
