from collections.abc import Callable

import pandas as pd
import pytest
import torch

from pipeline.analyses.planted import (
    ANY_LATENT,
    CHAT_SPECIFIC_LATENT,
    LINEAR_PROBE,
    MEAN_DIFFERENCE,
    MeanDifference,
    Planted,
    is_selection_half,
)
from pipeline.analyses.planted_columns import PLANTED_COLUMNS, Scoring
from pipeline.analyses.planted_scoring import NO_ANSWER, answer_numbers, probe_scores, units_of
from pipeline.analyses.rows import RowBatch, analyse
from pipeline.errors import InputError
from pipeline.schema import PLANTED_SHIFT, Flag

LABELS = ("refusal", "correction")


def _dialogues(batch_of: Callable, *, num_documents: int = 80, length: int = 10) -> RowBatch:
    """Latent 0 marks the first label weakly, 1 exactly, 2 is noise; x^chat - x^base holds the first label on axis 0."""
    generator = torch.Generator().manual_seed(0)
    doc_id = torch.arange(num_documents).repeat_interleave(length)
    position = torch.arange(length).repeat(num_documents)
    answers = position >= 4
    has_label = (torch.rand(num_documents, generator=generator) > 0.5)[doc_id] & answers
    has_other = (torch.rand(num_documents, generator=generator) > 0.5)[doc_id] & answers
    flags = torch.where(answers, int(Flag.ASSISTANT), int(Flag.USER)) | has_label * (1 << PLANTED_SHIFT)
    flags |= has_other * (2 << PLANTED_SHIFT)
    noise = torch.rand(len(doc_id), 3, generator=generator)
    code = torch.stack([noise[:, 0] + 0.5 * has_label, has_label * (1 + noise[:, 1]), noise[:, 2]], dim=1)
    x = torch.randn(len(doc_id), 2, 4, generator=generator)
    x[:, 1, 0] += 3.0 * has_label
    return batch_of(code, doc_id, flags=flags.int(), position=position, x=x, corpus=torch.ones(len(doc_id)).int())


def _planted(**options: object) -> Planted:
    return Planted(activation_dim=4, num_latents=3, labels=LABELS, chat_corpora=(1,), num_resamples=200, **options)  # type: ignore[arg-type]


def _row(table: pd.DataFrame, behavior: str, candidate: str, scoring: str = Scoring.TOKEN) -> dict[str, float]:
    is_asked = (table["behavior"] == behavior) & (table["candidate"] == candidate) & (table["scoring"] == scoring)
    chosen = table[is_asked]
    assert len(chosen) == 1
    return chosen.iloc[0].to_dict()


def test_the_exact_latent_wins_and_the_baseline_is_scored_beside_it(batch_of: Callable) -> None:
    batch = _dialogues(batch_of)
    baseline = MeanDifference(activation_dim=4, chat_corpora=(1,), first_tokens=3)
    direction = baseline.direction(analyse({"m": baseline}, [batch])["m"])
    planted = _planted(mean_difference_D=direction)
    table = planted.table(analyse({"p": planted}, [batch])["p"], chat_specific=[2, 0])
    assert list(table.columns) == [column.name for column in PLANTED_COLUMNS]
    assert len(table) == 2 * (3 * 3 + 1)
    best = _row(table, "refusal", ANY_LATENT)
    assert (best["latent"], best["auroc"], best["auroc_high"]) == (1, 1.0, 1.0)
    assert 0.8 < best["auroc_low"] < 1  # an interval never collapses
    restricted = _row(table, "refusal", CHAT_SPECIFIC_LATENT)
    assert restricted["latent"] == 0
    assert 0.6 < restricted["auroc_low"] < restricted["auroc"] < restricted["auroc_high"] < 1
    assert _row(table, "refusal", MEAN_DIFFERENCE)["auroc"] > 0.9
    assert 0.25 < _row(table, "correction", CHAT_SPECIFIC_LATENT)["auroc"] < 0.75


def test_scores_come_from_the_half_that_chose_nothing(batch_of: Callable) -> None:
    """A latent that is perfect on the choosing half and silent on the other wins the choice and scores chance."""
    batch = _dialogues(batch_of)
    chooses = is_selection_half(batch.doc_id_B)
    assert 0.3 < chooses.double().mean() < 0.7
    positive = batch.flags_B >> PLANTED_SHIFT & 1 == 1
    code = torch.zeros(len(positive), 3)
    code[:, 2] = (positive & chooses).float()
    code[:, 1] = (positive & ~chooses).float()
    cheat = batch_of(code, batch.doc_id_B, flags=batch.flags_B, corpus=batch.corpus_B, x=batch.x_BMD)
    planted = _planted()
    row = _row(planted.table(analyse({"p": planted}, [cheat])["p"]), "refusal", ANY_LATENT)
    assert (row["latent"], row["auroc"]) == (2, 0.5)
    assert row["num_rows"] == int((~chooses).sum())
    assert row["num_positive_rows"] == int((positive & ~chooses).sum())


def test_only_rows_of_chat_corpora_count(batch_of: Callable) -> None:
    dialogues = _dialogues(batch_of)
    web = dialogues._replace(corpus_B=torch.zeros_like(dialogues.corpus_B), doc_id_B=dialogues.doc_id_B + 1000)
    planted = _planted(mean_difference_D=torch.ones(4))
    baseline = MeanDifference(activation_dim=4, chat_corpora=(1,), first_tokens=3)
    alone, with_web = (analyse({"p": planted, "m": baseline}, part) for part in ([dialogues], [web, dialogues]))
    assert planted.table(alone["p"]).equals(planted.table(with_web["p"]))
    assert torch.equal(alone["m"]["difference"], with_web["m"]["difference"])
    with pytest.raises(InputError, match="got 0"):
        planted.table(analyse({"p": planted}, [web])["p"])


def test_without_a_candidate_the_score_is_nan(batch_of: Callable) -> None:
    batch = _dialogues(batch_of)
    planted = _planted()
    table = planted.table(analyse({"p": planted}, [batch])["p"])
    for candidate in (CHAT_SPECIFIC_LATENT, MEAN_DIFFERENCE):
        row = _row(table, "refusal", candidate)
        assert row["latent"] == -1
        assert row["auroc"] != row["auroc"]
    unlabelled = batch._replace(flags_B=batch.flags_B & 255)
    table = planted.table(analyse({"p": planted}, [unlabelled])["p"], chat_specific=[1])
    assert table["auroc"].isna().all()
    assert (table["latent"] == -1).all()
    assert (table["num_positive_rows"] == 0).all()


def test_the_mean_difference_is_the_mean_over_first_answer_tokens_of_the_choosing_half(batch_of: Callable) -> None:
    batch = _dialogues(batch_of)
    baseline = MeanDifference(activation_dim=4, chat_corpora=(1,), first_tokens=3)
    sums = analyse({"m": baseline}, [batch])["m"]
    chosen = (batch.position_B >= 4) & (batch.position_B < 7) & is_selection_half(batch.doc_id_B)
    expected = (batch.x_BMD[chosen, 1] - batch.x_BMD[chosen, 0]).mean(0)
    torch.testing.assert_close(baseline.direction(sums), expected)
    assert baseline.table(sums)["num_rows"] == int(chosen.sum())


def test_an_inverted_baseline_is_turned_round_on_the_choosing_half(batch_of: Callable) -> None:
    batch = _dialogues(batch_of)
    scores = []
    for sign in (1.0, -1.0):
        planted = _planted(mean_difference_D=sign * torch.tensor([1.0, 0, 0, 0]))
        table = planted.table(analyse({"p": planted}, [batch])["p"])
        scores.append(_row(table, "refusal", MEAN_DIFFERENCE)["auroc"])
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0] > 0.9


def test_bad_input_is_refused(batch_of: Callable) -> None:
    batch = _dialogues(batch_of)
    planted = _planted()
    with pytest.raises(InputError, match=r"got \[3\]"):
        planted.table(analyse({"p": planted}, [batch])["p"], chat_specific=[1, 3])
    wide = _planted(mean_difference_D=torch.ones(5))
    with pytest.raises(InputError, match="width 5, got 4"):
        wide.update(wide.start(), batch)
    with pytest.raises(InputError, match="got 0"):
        Planted(activation_dim=4, num_latents=3, labels=(), chat_corpora=(1,))
    with pytest.raises(InputError, match=r"got \[\]"):
        MeanDifference(activation_dim=4, chat_corpora=(), first_tokens=3)
    with pytest.raises(InputError, match="got 0"):
        MeanDifference(activation_dim=4, chat_corpora=(1,), first_tokens=0)


def test_answers_are_runs_of_assistant_rows_and_the_row_before_them() -> None:
    """Document 1: two answers of one dialogue; document 2 begins with its answer, so nothing decides it."""
    doc_id = torch.tensor([1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3])
    is_assistant = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0])
    number, is_answer = answer_numbers(doc_id, torch.where(is_assistant.bool(), int(Flag.ASSISTANT), int(Flag.USER)))
    none = NO_ANSWER
    assert number.tolist() == [none, 0, 0, 0, 1, 1, 1, 2, none, none, none]
    assert is_answer.tolist() == is_assistant.bool().tolist()


def _decided(batch_of: Callable, *, num_documents: int = 200, length: int = 8) -> tuple[RowBatch, torch.Tensor]:
    """Dialogues with two answers each; latent 1 fires at the deciding token of labelled answers, latent 0 everywhere.

    Every row of a labelled answer carries the label, and no activation within it tells.
    """
    generator = torch.Generator().manual_seed(3)
    doc_id = torch.arange(num_documents).repeat_interleave(length)
    place = torch.arange(length).repeat(num_documents)
    is_answer = (place % 4) >= 2
    labelled = torch.rand(num_documents, 2, generator=generator) > 0.6
    has_label = labelled[doc_id, place // 4]
    decides = (place % 4) == 1
    flags = torch.where(is_answer, int(Flag.ASSISTANT), int(Flag.TEMPLATE)) | (has_label & is_answer) * (
        1 << PLANTED_SHIFT
    )
    code = torch.rand(len(doc_id), 3, generator=generator)
    code[:, 1] = (decides & has_label) * 0.5
    x = torch.randn(len(doc_id), 2, 4, generator=generator)
    x[:, 1, 2] += 4.0 * (decides & has_label)
    batch = batch_of(code, doc_id, flags=flags.int(), position=place, x=x, corpus=torch.ones(len(doc_id)).int())
    return batch, labelled


def test_a_decision_is_found_where_it_is_made_and_not_in_every_token(batch_of: Callable) -> None:
    batch, labelled = _decided(batch_of)
    planted = _planted(mean_difference_D=torch.tensor([0.0, 0, 1, 0]))
    table = planted.table(analyse({"p": planted}, [batch])["p"], chat_specific=[1])
    auroc = {scoring: _row(table, "refusal", CHAT_SPECIFIC_LATENT, scoring)["auroc"] for scoring in Scoring.ALL}
    assert auroc[Scoring.TOKEN] < 0.6
    assert auroc[Scoring.DECIDING] == auroc[Scoring.TURN] == 1.0
    scored = ~is_selection_half(torch.arange(len(labelled)))
    for scoring in (Scoring.DECIDING, Scoring.TURN):
        row = _row(table, "refusal", CHAT_SPECIFIC_LATENT, scoring)
        assert (row["num_rows"], row["num_positive_rows"]) == (2 * int(scored.sum()), int(labelled[scored].sum()))
    assert _row(table, "refusal", MEAN_DIFFERENCE, Scoring.DECIDING)["auroc"] > 0.9
    assert 0.9 < _row(table, "refusal", LINEAR_PROBE, Scoring.DECIDING)["auroc"] <= 1


def test_parts_of_documents_merge_to_the_table_of_the_whole(batch_of: Callable) -> None:
    batch, _ = _decided(batch_of, num_documents=60)
    planted = _planted(mean_difference_D=torch.ones(4))
    whole = analyse({"p": planted}, [batch])["p"]
    parts = [
        batch_of(
            batch.codes.to_dense()[rows],
            batch.doc_id_B[rows],
            flags=batch.flags_B[rows],
            position=batch.position_B[rows],
            x=batch.x_BMD[rows],
            corpus=batch.corpus_B[rows],
        )
        for rows in (slice(0, 160), slice(160, 480))
    ]
    merged = planted.merge(*(analyse({"p": planted}, [part])["p"] for part in parts))
    pd.testing.assert_frame_equal(planted.table(merged, [1]), planted.table(whole, [1]))


def test_an_answer_is_scored_by_the_largest_of_its_rows(batch_of: Callable) -> None:
    """Against a loop over answers."""
    batch, _ = _decided(batch_of, num_documents=20)
    planted = _planted(mean_difference_D=torch.tensor([1.0, -2, 0, 0.5]))
    sums = analyse({"p": planted}, [batch])["p"]
    units = units_of(sums, Scoring.TURN, num_labels=2, num_latents=3)
    number, _ = answer_numbers(batch.doc_id_B, batch.flags_B)
    code, found = batch.codes.to_dense(), torch.zeros(len(units.doc_id_U), 3)
    found[units.pair_unit_P, units.pair_latent_P] = units.pair_value_P
    for answer in range(40):
        rows = number == answer
        torch.testing.assert_close(found[answer], code[rows].max(0).values)
        assert (
            units.score_U[answer] == sums["score"][rows].max() and units.negated_U[answer] == -sums["score"][rows].min()
        )
        assert (units.doc_id_U[answer] == batch.doc_id_B[rows]).all()


def test_a_probe_needs_both_classes_to_be_fitted() -> None:
    x = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    positive, chooses = torch.arange(30) % 3 == 0, torch.arange(30) < 15
    x[positive, 7] += 20
    scores = probe_scores(x, positive, chooses)  # fewer units than dimensions
    assert scores is not None and scores[positive].min() > scores[~positive].max()
    assert probe_scores(x, torch.zeros(30, dtype=torch.bool), chooses) is None
    assert probe_scores(x, positive, torch.zeros(30, dtype=torch.bool)) is None
