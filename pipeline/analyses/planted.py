"""Planted behaviours: how well latents find tokens whose label is known, against the mean-difference baseline.

For every label the best latent is chosen by AUROC, of tokens and of answers (planted_scoring.py), on one half of the
held-out documents and scored on the other half, so that choosing among thousands of latents does not raise the score.
The baseline of arXiv 2510.13900 is the mean of x^chat - x^base over the first tokens of the answers, taken on the
choosing half too, with each row's own difference projected onto it. A linear probe on the chat model's activations says
what a score could reach. Only rows of chat corpora count: labels exist nowhere else.

The trade-off: exact AUROC of all latents needs the active pairs of all labelled rows, so memory grows with the rows of
the held-out dialogues (16 bytes a pair). Labelled corpora are small.

Shapes: B rows, D width, F latents, L labels, N rows kept, P active pairs kept.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.latent_sets import require_latents
from pipeline.analyses.planted_columns import PLANTED_COLUMNS, Scoring
from pipeline.analyses.planted_scoring import NO_ANSWER, Units, answer_numbers, probe_scores, units_of
from pipeline.analyses.rows import (
    RowBatch,
    Sums,
    check_codes,
    document_index,
    document_starts,
    merge_sums,
    require_rows,
)
from pipeline.errors import InputError
from pipeline.numerics.statistics import DEFAULT_NUM_RESAMPLES, auroc_by_latent, auroc_interval, hash_documents
from pipeline.schema import BASE, CHAT, MAX_PLANTED_LABELS, PLANTED_SHIFT, Flag
from pipeline.text.conversations import conversation_of

CHAT_SPECIFIC_LATENT, ANY_LATENT, MEAN_DIFFERENCE = "chat-specific latent", "any latent", "mean difference"
LINEAR_PROBE = "linear probe"
"""Candidates, in table order; the probe reads the chat model at the deciding tokens alone."""
_NUM_BOOTSTRAP_GROUPS = 256
_HALF_SALT = 1
"""Divides documents into halves independently of the groups of Latent Scaling (salt 0)."""


def is_selection_half(doc_id_B: Tensor) -> Tensor:
    """Whether a document belongs to the half on which latents and directions are chosen; bool [B]."""
    return hash_documents(conversation_of(doc_id_B), num_groups=2, salt=_HALF_SALT) == 0


class MeanDifference:
    """Row analysis: mean of x^chat - x^base on the first tokens of each answer, choosing half only. Ignores codes."""

    def __init__(self, *, activation_dim: int, chat_corpora: Sequence[int], first_tokens: int) -> None:
        _check_corpora(chat_corpora)
        if first_tokens < 1:
            raise InputError(f"expected first_tokens >= 1, got {first_tokens}: the mean needs at least one token")
        self.activation_dim, self.chat_corpora, self.first_tokens = activation_dim, tuple(chat_corpora), first_tokens

    def start(self) -> Sums:
        """Sum of differences and number of rows."""
        return {
            "difference": torch.zeros(self.activation_dim, dtype=torch.float64),
            "num_rows": torch.zeros(1, dtype=torch.int64),
        }

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds the first first_tokens assistant rows of each dialogue."""
        is_answer_B = _is_in(batch.corpus_B, self.chat_corpora) & (batch.flags_B & int(Flag.ASSISTANT) != 0)
        answered_B = is_answer_B.long().cumsum(0)
        before_B = answered_B - is_answer_B.long()
        rank_B = before_B - before_B[document_starts(batch.doc_id_B)][document_index(batch.doc_id_B)]
        chosen_B = is_answer_B & (rank_B < self.first_tokens) & is_selection_half(batch.doc_id_B)
        x_NMD = batch.x_BMD[chosen_B].double()
        sums["difference"] += (x_NMD[:, CHAT] - x_NMD[:, BASE]).sum(0).cpu()
        sums["num_rows"] += len(x_NMD)

    def merge(self, a: Sums, b: Sums) -> Sums:
        """All sums add."""
        return merge_sums(a, b)

    def direction(self, sums: Sums) -> Tensor:
        """The mean difference, float32 [D]; zeros where the models agree. InputError where no answer was seen."""
        require_rows(int(sums["num_rows"]), "mean-difference")
        return (sums["difference"] / sums["num_rows"]).float()

    def table(self, sums: Sums) -> dict[str, float]:
        """Norm of the direction and the number of rows averaged."""
        return {"norm": float(self.direction(sums).norm()), "num_rows": float(sums["num_rows"])}


class Planted:
    """Row analysis: AUROC of the best latents and of the mean difference for every planted label."""

    def __init__(
        self,
        *,
        activation_dim: int,
        num_latents: int,
        labels: Sequence[str],
        chat_corpora: Sequence[int],
        mean_difference_D: Tensor | None = None,
        num_resamples: int = DEFAULT_NUM_RESAMPLES,
        seed: int = 0,
    ) -> None:
        _check_corpora(chat_corpora)
        if not 1 <= len(labels) <= MAX_PLANTED_LABELS:
            raise InputError(
                f"expected 1 to {MAX_PLANTED_LABELS} planted labels, got {len(labels)}: use a labelled corpus or turn "
                "the planted analysis off"
            )
        self.activation_dim, self.num_latents = activation_dim, num_latents
        self.labels, self.chat_corpora = tuple(labels), tuple(chat_corpora)
        self.mean_difference_D = None if mean_difference_D is None else mean_difference_D.detach().float().cpu()
        self.num_resamples, self.seed = num_resamples, seed

    def start(self) -> Sums:
        """No row yet: rows (document, label bits, answer, baseline score), chat's x of deciding rows, active pairs."""
        dtypes = {
            "doc_id": torch.int64,
            "labels": torch.int32,
            "answer": torch.int64,
            "is_answer": torch.int32,
            "score": torch.float32,
            "pair_row": torch.int64,
            "pair_latent": torch.int32,
            "pair_value": torch.float32,
        }
        sums = {name: torch.zeros(0, dtype=dtype) for name, dtype in dtypes.items()}
        return {**sums, "deciding_x": torch.zeros(0, self.activation_dim)}

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Appends the rows of chat corpora and their active pairs."""
        check_codes(batch.codes, self.num_latents)
        is_chat_B = _is_in(batch.corpus_B, self.chat_corpora)
        row_P = batch.codes.rows_P()
        is_kept_P = is_chat_B[row_P]
        place_B = is_chat_B.long().cumsum(0) - 1
        answer_N, is_answer_N = answer_numbers(batch.doc_id_B[is_chat_B], batch.flags_B[is_chat_B])
        decides_N = (answer_N != NO_ANSWER) & ~is_answer_N
        part = {
            "doc_id": batch.doc_id_B[is_chat_B].long(),
            "labels": batch.flags_B[is_chat_B].to(torch.int32) >> PLANTED_SHIFT,
            "answer": answer_N,
            "is_answer": is_answer_N.to(torch.int32),
            "score": self._baseline_scores(batch.x_BMD[is_chat_B]),
            "deciding_x": batch.x_BMD[is_chat_B][decides_N, CHAT].float(),
            "pair_row": place_B[row_P[is_kept_P]],
            "pair_latent": batch.codes.latents_P[is_kept_P].to(torch.int32),
            "pair_value": batch.codes.values_P[is_kept_P].float(),
        }
        sums.update(self.merge(sums, {name: value.cpu() for name, value in part.items()}))

    def _baseline_scores(self, x_NMD: Tensor) -> Tensor:
        if self.mean_difference_D is None:
            return torch.full((len(x_NMD),), torch.nan)
        if len(self.mean_difference_D) != x_NMD.shape[2]:
            raise InputError(
                f"expected activations of width {len(self.mean_difference_D)}, got {x_NMD.shape[2]}: take the mean "
                "difference from the same activations"
            )
        return (x_NMD[:, CHAT] - x_NMD[:, BASE]) @ self.mean_difference_D.to(x_NMD)

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The rows of both parts; the second part's pairs point behind the first part's rows, as do its answers."""
        num_answers = int(a["answer"].max()) + 1 if len(a["answer"]) else 0
        answer = torch.where(b["answer"] == NO_ANSWER, NO_ANSWER, b["answer"] + num_answers)
        shifted = {**b, "pair_row": b["pair_row"] + len(a["doc_id"]), "answer": answer}
        return {name: torch.cat([a[name], shifted[name]]) for name in a}

    def table(self, sums: Sums, chat_specific: Sequence[int] = ()) -> pd.DataFrame:
        """PLANTED_COLUMNS: for every label and scoring the candidates, scored on the half that chose nothing.

        chat_specific holds the latents that the verdict calls chat-specific. latent is -1 and auroc NaN where there is
        no candidate, or where the label does not occur in both halves.
        """
        require_rows(len(sums["doc_id"]), "planted")
        require_latents(chat_specific, self.num_latents, "chat-specific latents")
        candidates = {
            CHAT_SPECIFIC_LATENT: torch.tensor(sorted(chat_specific), dtype=torch.int64),
            ANY_LATENT: torch.arange(self.num_latents),
        }
        rows = []
        for scoring in Scoring.ALL:
            units = units_of(sums, scoring, num_labels=len(self.labels), num_latents=self.num_latents)
            chooses_U = is_selection_half(units.doc_id_U)
            chosen_FL = self._auroc_by_latent(units, chooses_U)
            for column, label in enumerate(self.labels):
                positive_U = units.positive_UL[:, column]
                for candidate, latents in candidates.items():
                    latent = _best(chosen_FL[:, column], latents)
                    score_U = None if latent < 0 else _dense_scores(units, latent)
                    rows.append((label, scoring, candidate, latent, *self._score(units, score_U, positive_U)))
                score_U = self._oriented_baseline(units, positive_U, chooses_U)
                rows.append((label, scoring, MEAN_DIFFERENCE, -1, *self._score(units, score_U, positive_U)))
                if scoring == Scoring.DECIDING:
                    score_U = probe_scores(sums["deciding_x"], positive_U, chooses_U)
                    rows.append((label, scoring, LINEAR_PROBE, -1, *self._score(units, score_U, positive_U)))
        table = pd.DataFrame(rows, columns=[column.name for column in PLANTED_COLUMNS])
        order = {label: place for place, label in enumerate(self.labels)}
        table = table.sort_values("behavior", key=lambda names: names.map(order), kind="stable", ignore_index=True)
        return table.astype({"latent": "int32"})

    def auroc_by_latent(self, sums: Sums, scoring: str) -> Tensor:
        """AUROC of every latent for every label on all units of a kind, float64 [F, L]."""
        units = units_of(sums, scoring, num_labels=len(self.labels), num_latents=self.num_latents)
        return self._auroc_by_latent(units, torch.ones(len(units.doc_id_U), dtype=torch.bool))

    def _auroc_by_latent(self, units: Units, is_used_U: Tensor) -> Tensor:
        is_used_P = is_used_U[units.pair_unit_P]
        return auroc_by_latent(
            units.pair_latent_P[is_used_P],
            units.pair_value_P[is_used_P],
            units.positive_UL[units.pair_unit_P[is_used_P]],
            num_latents=self.num_latents,
            num_positive_L=units.positive_UL[is_used_U].sum(0),
            num_rows=int(is_used_U.sum()),
        )

    def _oriented_baseline(self, units: Units, positive_U: Tensor, chooses_U: Tensor) -> Tensor | None:
        """The baseline's scores, their sign chosen on the choosing half; None where there is no baseline."""
        if self.mean_difference_D is None or not bool(chooses_U.any()):
            return None
        groups_U = torch.zeros(int(chooses_U.sum()), dtype=torch.int64)
        auroc, negated = (
            auroc_interval(score_U[chooses_U], positive_U[chooses_U], groups_U, num_resamples=2).estimate
            for score_U in (units.score_U, units.negated_U)
        )
        if bool(auroc.isnan()):
            return None
        return units.negated_U if negated > auroc else units.score_U

    def _score(self, units: Units, score_U: Tensor | None, positive_U: Tensor) -> tuple[float, float, float, int, int]:
        """auroc, auroc_low, auroc_high, num_positive_rows, num_rows, on the half that chose nothing."""
        is_scored_U = ~is_selection_half(units.doc_id_U)
        counts = int((positive_U & is_scored_U).sum()), int(is_scored_U.sum())
        if score_U is None or counts[1] == 0:
            return float("nan"), float("nan"), float("nan"), *counts
        interval = auroc_interval(
            score_U[is_scored_U],
            positive_U[is_scored_U],
            hash_documents(conversation_of(units.doc_id_U[is_scored_U]), num_groups=_NUM_BOOTSTRAP_GROUPS),
            num_resamples=self.num_resamples,
            seed=self.seed,
        )
        return interval.estimate.item(), interval.low.item(), interval.high.item(), *counts


def _best(auroc_F: Tensor, latents: Tensor) -> int:
    """The latent with the highest AUROC, the smallest index at a tie; -1 where there is none or it is undefined."""
    auroc = auroc_F[latents]
    return -1 if len(auroc) == 0 or bool(auroc.isnan().any()) else int(latents[auroc.argmax()])


def _dense_scores(units: Units, latent: int) -> Tensor:
    """f of one latent on every unit, 0 where it does not fire."""
    is_latent_P = units.pair_latent_P == latent
    score_U = torch.zeros(len(units.doc_id_U))
    score_U[units.pair_unit_P[is_latent_P]] = units.pair_value_P[is_latent_P]
    return score_U


def _is_in(corpus_B: Tensor, corpora: Sequence[int]) -> Tensor:
    return torch.isin(corpus_B, torch.tensor(corpora, dtype=corpus_B.dtype, device=corpus_B.device))


def _check_corpora(chat_corpora: Sequence[int]) -> None:
    if not chat_corpora or min(chat_corpora) < 0:
        raise InputError(
            f"expected indices of the chat corpora, got {list(chat_corpora)}: planted labels need a corpus of dialogues"
        )
