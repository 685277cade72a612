"""Exact selection: the n largest scores of a batch that is spread over ranks, and the k largest of every row.

BatchTopK keeps the k * B largest scores of the whole global batch (arXiv 2412.06410; 2504.02922, section 2), so the cut
must not depend on how rows or latents are divided. The n-th largest score is found by a histogram over the bits of the
positive floats, a few bits per pass, most significant first (bits of positive floats order like the floats); counts are
summed over ranks, so a pass costs one all-reduce of at most 2048 numbers. Scores that equal the cut are kept in the
order of (data rank, row, latent), which is their order in the undivided batch.

The candidates are pairs collected above a guessed floor. `is_enough` tells whether the floor was too high, and the
caller then collects again: a guess can cost time, it never changes the result.

Shapes: B local rows, F local latents, P candidate pairs, R latent ranks, K pairs kept per row.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.parallel import Mesh

_LEVELS = {
    torch.float32: (torch.int32, ((20, 11), (10, 10), (0, 10))),
    torch.float64: (torch.int64, ((52, 11), (41, 11), (30, 11), (19, 11), (8, 11), (0, 8))),
}
"""Per score dtype: the integer of its width, and (shift, number of bits) of every pass; the sign bit is left out."""


class Cut(NamedTuple):
    """Where a selection ends, the same on every rank."""

    score: Tensor
    """float64 scalar: the smallest kept score; 0 if no score is positive."""
    bits: Tensor
    """int64 scalar: its bit pattern."""
    num_ties: Tensor
    """int64 scalar: how many of the scores that equal it are kept, over all ranks."""


class Selection(NamedTuple):
    """The kept pairs of this rank."""

    codes: SparseCodes
    mask_P: Tensor
    """Which candidates were kept."""
    smallest: Tensor
    """float64 scalar: smallest kept score over all ranks; 0 if none was kept."""


def find_cut(scores_P: Tensor, num_keep: int, mesh: Mesh) -> Cut:
    """The num_keep-th largest positive score over all ranks, or the smallest positive one if there are fewer.

    scores_P is float32 or float64 and may hold zeros, which never count. Collective over the mesh's world.
    """
    as_int, levels = _LEVELS[scores_P.dtype]
    bits_P = scores_P.view(as_int).to(torch.int64)
    is_alive_P = scores_P > 0
    remaining = torch.tensor(num_keep, device=scores_P.device)
    cut = torch.zeros((), dtype=torch.int64, device=scores_P.device)
    for shift, width in levels:
        digits_P = (bits_P >> shift) & ((1 << width) - 1)
        counts = torch.zeros(1 << width, dtype=torch.int64, device=scores_P.device)
        mesh.sum_(counts.scatter_add_(0, digits_P, is_alive_P.to(torch.int64)), "world")
        above = counts.flip(0).cumsum(0)
        remaining = torch.minimum(remaining, above[-1])
        position = (above < remaining).sum()
        digit = (1 << width) - 1 - position
        remaining = remaining - (above[position] - counts[digit])
        cut = (cut << width) | digit
        is_alive_P = is_alive_P & (digits_P == digit)
    # remaining is 0 only if nothing is positive; the bits are then those of a NaN, above every score.
    score = cut.to(as_int).view(scores_P.dtype).to(torch.float64)
    return Cut(torch.where(remaining > 0, score, 0.0), cut, remaining)


def select_batch(candidates: SparseCodes, scores_P: Tensor, *, num_keep: int, mesh: Mesh) -> Selection:
    """The num_keep largest positive scores of the global batch; ties by (data rank, row, latent).

    candidates must hold every pair whose score reaches the result's cut; see `is_enough`. Every rank has
    as many rows. Collective over the mesh's world.
    """
    if mesh.world_size == 1 and scores_P.device.type == "cpu":
        return _select_alone(candidates, scores_P, num_keep)
    cut = find_cut(scores_P, num_keep, mesh)
    bits_P = scores_P.view(_LEVELS[scores_P.dtype][0]).to(torch.int64)
    is_tie_P = (bits_P == cut.bits) & (scores_P > 0)
    place_P = is_tie_P.cumsum(0)
    if mesh.world_size > 1:
        before = torch.nn.functional.pad(place_P, (1, 0))[candidates.row_offsets]
        ahead_B = _ties_ahead(before.diff(), mesh) - before[:-1]
        place_P = place_P + ahead_B[candidates.rows_P()]
    mask_P = (bits_P > cut.bits) | (is_tie_P & (place_P <= cut.num_ties))
    return Selection(candidates.keep(mask_P), mask_P, cut.score)


def _select_alone(candidates: SparseCodes, scores_P: Tensor, num_keep: int) -> Selection:
    """`select_batch` for one rank on CPU, where a partial sort is faster than counting bits."""
    scores = scores_P.numpy()
    num_keep = min(num_keep, int(np.count_nonzero(scores > 0)))
    if num_keep == 0:
        return Selection(candidates.keep(scores_P > 0), scores_P > 0, torch.zeros((), dtype=torch.float64))
    cut = np.partition(scores, len(scores) - num_keep)[len(scores) - num_keep]
    is_kept = scores >= cut
    num_surplus = int(np.count_nonzero(is_kept)) - num_keep
    if num_surplus:
        is_kept[np.flatnonzero(scores == cut)[-num_surplus:]] = False
    mask_P = torch.from_numpy(is_kept)
    return Selection(candidates.keep(mask_P), mask_P, torch.tensor(float(cut), dtype=torch.float64))


def select_batch_per_model(candidates: SparseCodes, score_PM: Tensor, *, num_keep: int, mesh: Mesh) -> Selection:
    """The decoupled code weight: `select_batch` once per model, on that model's scores.

    The kept pairs are those that any model keeps; model_mask_PM says which. `smallest` is [M].
    """
    parts = [
        select_batch(candidates, score_P.contiguous(), num_keep=num_keep, mesh=mesh) for score_P in score_PM.unbind(1)
    ]
    mask_PM = torch.stack([part.mask_P for part in parts], dim=1)
    mask_P = mask_PM.any(1)
    codes = candidates._replace(model_mask_PM=mask_PM).keep(mask_P)
    return Selection(codes, mask_P, torch.stack([part.smallest for part in parts]))


def is_enough(scores_P: Tensor, num_keep: int, *, floor: float, mesh: Mesh) -> bool:
    """Whether candidates collected above floor hold the num_keep largest scores of the global batch."""
    if floor <= 0:
        return True
    count = mesh.sum_((scores_P >= floor).sum(), "world")
    return int(count) >= num_keep


def _ties_ahead(ties_B: Tensor, mesh: Mesh) -> Tensor:
    """Ties that come before this rank's ties of each row in the order (data rank, row, latent rank)."""
    all_RB = mesh.gather(ties_B, "world")
    ordered = all_RB.view(mesh.data_size, mesh.latent_size, -1).transpose(1, 2)
    ahead = (ordered.flatten().cumsum(0) - ordered.flatten()).view_as(ordered)
    return ahead[mesh.data_rank, :, mesh.latent_rank]


def select_rows(candidates: SparseCodes, scores_P: Tensor, *, k: int, mesh: Mesh) -> Selection:
    """The k largest positive scores of every row over the latent ranks; ties go to the smaller latent.

    candidates must hold every pair that belongs to the result. Collective over the mesh's latent axis, except that
    `smallest` is taken over the world.
    """
    rows_P = candidates.rows_P()
    by_score = scores_P.sort(descending=True, stable=True).indices
    order = by_score[rows_P[by_score].sort(stable=True).indices]
    place_P = torch.empty_like(order)
    place_P[order] = torch.arange(order.shape[0], device=order.device) - candidates.row_offsets[rows_P]
    mask_P = (place_P < k) & (scores_P > 0)
    if mesh.latent_size > 1:
        best_BK = scores_P.new_zeros(candidates.num_rows, k)
        kept = mask_P.nonzero().squeeze(1)
        best_BK[rows_P[kept], place_P[kept]] = scores_P[kept]
        mask_P[kept] = _is_within(best_BK, mesh)[rows_P[kept], place_P[kept]]
    smallest = torch.where(mask_P, scores_P, torch.inf).amin() if mask_P.numel() else scores_P.new_tensor(torch.inf)
    smallest = -mesh.max_(-smallest.to(torch.float64), "world")
    return Selection(candidates.keep(mask_P), mask_P, torch.where(smallest.isinf(), 0.0, smallest))


def top_codes_of_rows(preact_BF: Tensor, weight_F: Tensor, *, k: int, mesh: Mesh) -> SparseCodes:
    """The k largest positive scores preact * weight of every row, values the raw codes; ties to the smaller latent."""
    score_BF = preact_BF.clamp(min=0) * weight_F
    least_B1 = score_BF.topk(min(k, score_BF.shape[1]), dim=1).values[:, -1:]
    candidates = SparseCodes.from_dense(torch.where(score_BF >= least_B1, score_BF, 0.0))
    values_P = preact_BF[candidates.rows_P(), candidates.latents_P]
    selection = select_rows(candidates, candidates.values_P, k=k, mesh=mesh)
    return selection.codes._replace(values_P=values_P[selection.mask_P])


def top_of_rows(scores_BF: Tensor, k: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """(scores_BK, latents_BK) of the k largest scores of every row of a small dense matrix, 0 where not kept.

    With latent ranks, k is over all of them and a rank returns only its own share. Equal scores within a rank come in
    the order of torch.topk.
    """
    best = scores_BF.topk(min(k, scores_BF.shape[1]), dim=1)
    scores_BK = torch.nn.functional.pad(best.values.clamp(min=0), (0, k - best.values.shape[1]))
    latents_BK = torch.nn.functional.pad(best.indices, (0, k - best.indices.shape[1]))
    if mesh.latent_size > 1:
        scores_BK = torch.where(_is_within(scores_BK, mesh), scores_BK, 0.0)
    return scores_BK, latents_BK


def _is_within(best_BK: Tensor, mesh: Mesh) -> Tensor:
    """bool [B, K]: which of this rank's descending scores are among the K largest of all latent ranks."""
    k = best_BK.shape[1]
    all_RBK = mesh.gather(best_BK, "latent")
    # Rank-major columns with latents ascending over ranks: a stable sort breaks ties by latent.
    columns = all_RBK.transpose(0, 1).flatten(1)
    order = columns.sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return place[:, mesh.latent_rank * k : (mesh.latent_rank + 1) * k] < k
