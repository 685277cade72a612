"""What is scored by a planted label: tokens, the token that decides an answer, or whole answers.

A behaviour that was learnt from text alone is decided where the answer begins: the last token before it (the end of the
generation header) predicts its first token. Later tokens of the answer may carry no trace of the decision. So each
label is asked of three kinds of units, each against its own negatives:

- `token`: every row of a dialogue; positive are the labelled rows;
- `deciding token`: the row before each answer; positive where the answer holds a labelled row;
- `turn`: each answer with its deciding token, scored by its maximum; positive as before.

An answer is a run of consecutive assistant rows of one document.

Shapes: B rows of a batch, N rows kept, T answers, U units, L labels, P active pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.analyses.planted_columns import Scoring
from pipeline.analyses.rows import Sums
from pipeline.schema import Flag

NO_ANSWER = -1


def answer_numbers(doc_id_B: Tensor, flags_B: Tensor) -> tuple[Tensor, Tensor]:
    """(the answer of each row and of the row before it, else NO_ANSWER; whether a row belongs to it), int64 and bool.

    Rows of a document are contiguous and in order. Answers are counted from 0.
    """
    is_answer_B = (flags_B & int(Flag.ASSISTANT)) != 0
    follows_B = torch.zeros_like(is_answer_B)
    follows_B[1:] = doc_id_B[1:] == doc_id_B[:-1]
    starts_B = is_answer_B.clone()
    starts_B[1:] &= ~(is_answer_B[:-1] & follows_B[1:])
    number_B = torch.where(is_answer_B, starts_B.long().cumsum(0) - 1, NO_ANSWER)
    decides_B = torch.zeros_like(is_answer_B)
    decides_B[:-1] = starts_B[1:] & follows_B[1:]
    number_B[:-1] = torch.where(decides_B[:-1], number_B[1:], number_B[:-1])
    return number_B, is_answer_B


class Units(NamedTuple):
    """What is scored, with its labels, its active pairs and the baseline's score."""

    doc_id_U: Tensor
    positive_UL: Tensor
    score_U: Tensor
    """Of the mean difference; the highest one where a unit has several rows."""
    negated_U: Tensor
    """The same for the opposite direction."""
    pair_unit_P: Tensor
    pair_latent_P: Tensor
    pair_value_P: Tensor


def units_of(sums: Sums, scoring: str, *, num_labels: int, num_latents: int) -> Units:
    """The units of one kind, from the sums of analyses.planted.Planted."""
    bits_L = torch.arange(num_labels, dtype=torch.int32)
    positive_NL = (sums["labels"][:, None] >> bits_L) & 1 == 1
    score_N = sums["score"]
    pairs = sums["pair_row"], sums["pair_latent"].long(), sums["pair_value"]
    if scoring == Scoring.TOKEN:
        return Units(sums["doc_id"], positive_NL, score_N, -score_N, *pairs)
    number_N, is_answer_N = sums["answer"], sums["is_answer"].bool()
    in_answer_N = number_N != NO_ANSWER
    num_answers = int(number_N.max()) + 1 if len(number_N) else 0
    positive_TL = torch.zeros(num_answers, num_labels, dtype=torch.bool)
    for label in range(num_labels):
        positive_TL[number_N[is_answer_N & positive_NL[:, label]], label] = True
    if scoring == Scoring.DECIDING:
        decides_N = in_answer_N & ~is_answer_N
        place_N = decides_N.long().cumsum(0) - 1
        is_kept_P = decides_N[pairs[0]]
        kept = (pairs[0][is_kept_P], pairs[1][is_kept_P], pairs[2][is_kept_P])
        score_U = score_N[decides_N]
        return Units(
            sums["doc_id"][decides_N], positive_TL[number_N[decides_N]], score_U, -score_U, place_N[kept[0]], *kept[1:]
        )
    doc_id_T = torch.zeros(num_answers, dtype=torch.int64)
    doc_id_T[number_N[in_answer_N]] = sums["doc_id"][in_answer_N]
    best_T, opposite_T = (
        torch.full((num_answers,), -torch.inf).scatter_reduce(
            0, number_N[in_answer_N], sign * score_N[in_answer_N], "amax"
        )
        for sign in (1, -1)
    )
    return Units(doc_id_T, positive_TL, best_T, opposite_T, *_largest(pairs, number_N, num_latents))


def _largest(pairs: tuple[Tensor, Tensor, Tensor], number_N: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of each latent in each answer, as (answer, latent, value)."""
    row_P, latent_P, value_P = pairs
    is_kept_P = number_N[row_P] != NO_ANSWER
    key_P, inverse_P = torch.unique(number_N[row_P[is_kept_P]] * num_latents + latent_P[is_kept_P], return_inverse=True)
    largest_P = torch.zeros(len(key_P), dtype=value_P.dtype).scatter_reduce(0, inverse_P, value_P[is_kept_P], "amax")
    return key_P // num_latents, key_P % num_latents, largest_P


def probe_scores(x_UD: Tensor, positive_U: Tensor, chooses_U: Tensor) -> Tensor | None:
    """Scores of a linear probe that is fitted on the units that choose: what the activations hold at most, nearly.

    Ridge regression on the label, x centred and the penalty a hundredth of the mean variance: the direction of linear
    discriminant analysis, kept finite where there are fewer units than dimensions. None where only one class is there.
    """
    target_U = positive_U[chooses_U].double()
    if not 0 < float(target_U.mean() if len(target_U) else 0.0) < 1:
        return None
    x_UD = x_UD.double() - x_UD[chooses_U].double().mean(0)
    fitted_UD = x_UD[chooses_U]
    gram_DD = fitted_UD.T @ fitted_UD
    penalty = 0.01 * gram_DD.diagonal().mean()
    weight_D = torch.linalg.solve(
        gram_DD + penalty * torch.eye(len(gram_DD), dtype=torch.float64), fitted_UD.T @ (target_U - target_U.mean())
    )
    score_U: Tensor = x_UD @ weight_D
    return score_U.float()
