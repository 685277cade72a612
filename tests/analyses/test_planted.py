from collections.abc import Callable

import pytest
import torch

from pipeline.analyses.planted import (
    ANY_LATENT,
    CHAT_SPECIFIC_LATENT,
    MEAN_DIFFERENCE,
    MeanDifference,
    Planted,
    is_selection_half,
)
from pipeline.analyses.rows import RowBatch, analyse
from pipeline.errors import InputError
from pipeline.schema import PLANTED_COLUMNS, PLANTED_SHIFT, Flag

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
    return Planted(num_latents=3, labels=LABELS, chat_corpora=(1,), num_resamples=200, **options)  # type: ignore[arg-type]


def _row(table: object, behavior: str, candidate: str) -> dict[str, float]:
    chosen = table[(table["behavior"] == behavior) & (table["candidate"] == candidate)]  # type: ignore[index]
    assert len(chosen) == 1
    return chosen.iloc[0].to_dict()


def test_the_exact_latent_wins_and_the_baseline_is_scored_beside_it(batch_of: Callable) -> None:
    batch = _dialogues(batch_of)
    baseline = MeanDifference(activation_dim=4, chat_corpora=(1,), first_tokens=3)
    direction = baseline.direction(analyse({"m": baseline}, [batch])["m"])
    planted = _planted(mean_difference_D=direction)
    table = planted.table(analyse({"p": planted}, [batch])["p"], chat_specific=[2, 0])
    assert list(table.columns) == [column.name for column in PLANTED_COLUMNS]
    assert len(table) == 6
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
        Planted(num_latents=3, labels=(), chat_corpora=(1,))
    with pytest.raises(InputError, match=r"got \[\]"):
        MeanDifference(activation_dim=4, chat_corpora=(), first_tokens=3)
    with pytest.raises(InputError, match="got 0"):
        MeanDifference(activation_dim=4, chat_corpora=(1,), first_tokens=0)
