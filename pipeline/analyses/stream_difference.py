"""How different two models' residual streams are apart from scale and offset: sums, intervals and a sample of rows.

For rows x^b and x^c of base and chat, both centred, the best scale and shift takes a x^b with a = <x^c, x^b> / |x^b|^2.
What it leaves is |x^c - a x^b|^2 / |x^c|^2 = 1 - rho^2, which no rescaling or constant offset of either model can
change. All of it follows exactly from sums per document group, so parts add up and the interval leaves out one group at
a time.

Two numbers need the rows themselves: the mean cosine of centred rows, and the effective rank of the difference. They
come from a sample of rows, drawn by a hash of document and position, so that it is the same in any order of the parts.
For the effective rank that is better than D x D sums, which have no interval and are biased low: only products of rows
of different document groups enter, which makes the numerator and the denominator unbiased.

Shapes: N rows, C rows of a chunk, M models (0 = base, 1 = chat), D width, G document groups, L layers, K = 3 products
(base with itself, chat with itself, base with chat), V = 1 + G (all groups, then without each).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.analyses.rows import Sums
from pipeline.numerics.leave_one_out import leave_one_out_interval, totals_without_each
from pipeline.numerics.statistics import Interval, hash_documents, jackknife_interval
from pipeline.schema import BASE, CHAT

_ROWS_PER_CHUNK = 4096
"""Rows that exist in float64 at the same time."""


class StreamDifference(NamedTuple):
    """Per layer [L], with 95% intervals over document groups; NaN where a model's rows do not vary."""

    raw: Interval
    """Root of sum |x^c - x^b|^2 / sum |x^c|^2, as the rows are."""
    fitted: Interval
    """Root of the share of the centred chat rows that the best scale and shift leaves; 0 = the same, 1 = unrelated."""
    scale_ratio: Interval
    """Root mean square of centred chat rows over that of centred base rows."""
    num_rows: Tensor
    """int64."""


class SampledDifference(NamedTuple):
    """Scalars with 95% intervals over document groups."""

    cosine: Interval
    """Mean cosine of centred base and chat rows, every row counting the same; 1 = the same direction."""
    effective_rank: Interval
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of what scale and shift leave, 1
    to D. NaN where they leave nothing."""


def empty_stream_sums(num_layers: int, num_groups: int, activation_dim: int) -> Sums:
    """Sums of no rows."""
    shapes = {"rows_LG": (), "raw_LG": (), "products_LGK": (3,), "x_LGMD": (2, activation_dim)}
    return {name: torch.zeros(num_layers, num_groups, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def add_stream_rows(sums: Sums, layer: int, x_NMD: Tensor, group_N: Tensor) -> None:
    """Adds rows of one layer (its place among the L), in place; sums are float64 whatever x is."""
    for start in range(0, len(x_NMD), _ROWS_PER_CHUNK):
        x_CMD = x_NMD[start : start + _ROWS_PER_CHUNK].double()
        base_CD, chat_CD = x_CMD[:, BASE], x_CMD[:, CHAT]
        pairs = ((base_CD, base_CD), (chat_CD, chat_CD), (base_CD, chat_CD))
        group_C = group_N[start : start + _ROWS_PER_CHUNK].cpu()
        for name, value in (
            ("rows_LG", torch.ones(len(x_CMD), dtype=torch.float64)),
            # All three in one tensor, summed in one order: equal streams then differ by exactly 0.
            ("products_LGK", torch.stack([(left * right).sum(1) for left, right in pairs], dim=1)),
            ("raw_LG", (chat_CD - base_CD).square().sum(1)),
            ("x_LGMD", x_CMD),
        ):
            sums[name][layer].index_add_(0, group_C, value.cpu())


class _Centred(NamedTuple):
    """Second moments about the means, on all groups and without each [V]."""

    base_V: Tensor
    chat_V: Tensor
    cross_V: Tensor


def _centred(sums: Sums, layer: int) -> _Centred:
    rows_V = totals_without_each(sums["rows_LG"][layer])
    x_VMD = totals_without_each(sums["x_LGMD"][layer])
    base_V, chat_V, cross_V = totals_without_each(sums["products_LGK"][layer]).unbind(1)
    base_VD, chat_VD = x_VMD[:, BASE], x_VMD[:, CHAT]
    return _Centred(
        base_V - (base_VD * base_VD).sum(1) / rows_V,
        chat_V - (chat_VD * chat_VD).sum(1) / rows_V,
        cross_V - (base_VD * chat_VD).sum(1) / rows_V,
    )


def stream_differences(sums: Sums) -> StreamDifference:
    """The estimates of every layer. All NaN for a layer without rows."""
    found = []
    for layer in range(len(sums["rows_LG"])):
        centred = _centred(sums, layer)
        squares_V = totals_without_each(sums["products_LGK"][layer])[:, CHAT]
        values_VF = torch.stack(
            [
                (totals_without_each(sums["raw_LG"][layer]).clamp(min=0) / squares_V).sqrt(),
                (1 - centred.cross_V * centred.cross_V / (centred.base_V * centred.chat_V)).clamp(min=0).sqrt(),
                (centred.chat_V.clamp(min=0) / centred.base_V).sqrt(),
            ],
            dim=1,
        )
        values_VF[:, 1:][~_varies(sums, layer, centred)] = torch.nan
        weight_GF = sums["rows_LG"][layer][:, None].expand(-1, 3)
        every = leave_one_out_interval(values_VF, weight_GF)
        every = every._replace(low=every.low.clamp(min=0))
        found.append(torch.stack(every))
    all_ELF = torch.stack(found, dim=1)  # E: estimate, low, high
    raw, fitted, scale_ratio = (Interval(*part_ELF) for part_ELF in all_ELF.unbind(2))
    return StreamDifference(raw, fitted, scale_ratio, sums["rows_LG"].sum(1).to(torch.int64))


def _varies(sums: Sums, layer: int, centred: _Centred) -> Tensor:
    """bool [V]: whether both models' rows vary by more than float64 leaves of a constant's square."""
    floor_VK = totals_without_each(sums["products_LGK"][layer]) * 1e-13
    return (centred.base_V > floor_VK[:, BASE]) & (centred.chat_V > floor_VK[:, CHAT])


def empty_row_sample(activation_dim: int) -> Sums:
    """A sample of no rows."""
    return {
        "sample_key_N": torch.zeros(0, dtype=torch.int64),
        "sample_group_N": torch.zeros(0, dtype=torch.int64),
        "sample_x_NMD": torch.zeros(0, 2, activation_dim),
    }


def row_keys(doc_id_N: Tensor, position_N: Tensor) -> Tensor:
    """The hash by which rows are drawn, int64 [N]: a function of document and position alone."""
    return hash_documents(hash_documents(doc_id_N, num_groups=1 << 62) + position_N, num_groups=1 << 62, salt=1)


def add_to_sample(sample: Sums, key_N: Tensor, group_N: Tensor, x_NMD: Tensor, *, num_rows: int) -> Sums:
    """The num_rows rows of the smallest keys among the sample and these rows."""
    first_N = key_N.argsort(stable=True)[:num_rows]
    added = {
        "sample_key_N": key_N[first_N],
        "sample_group_N": group_N[first_N],
        "sample_x_NMD": x_NMD[first_N.to(x_NMD.device)].float().cpu(),
    }
    return merge_samples(sample, added, num_rows=num_rows)


def merge_samples(a: Sums, b: Sums, *, num_rows: int) -> Sums:
    """The num_rows rows of the smallest keys of both parts, in order of their keys."""
    joined = {name: torch.cat([a[name], b[name]]) for name in ("sample_key_N", "sample_group_N", "sample_x_NMD")}
    kept_N = joined["sample_key_N"].argsort(stable=True)[:num_rows]
    return {name: value[kept_N] for name, value in joined.items()}


def sampled_difference(sums: Sums, *, layer: int = 0) -> SampledDifference:
    """Cosine and effective rank from the sample, with means and scale from the sums of all rows of `layer`."""
    num_groups = sums["rows_LG"].shape[1]
    total = sums["rows_LG"][layer].sum()
    mean_MD = sums["x_LGMD"][layer].sum(0) / total
    centred = _centred(sums, layer)
    x_NMD = sums["sample_x_NMD"].double() - mean_MD
    group_N = sums["sample_group_N"]
    cosine_N = torch.nn.functional.cosine_similarity(x_NMD[:, BASE], x_NMD[:, CHAT], dim=1)
    sum_GF = torch.zeros(num_groups, 2, dtype=torch.float64)
    sum_GF.index_add_(0, group_N, torch.stack([cosine_N, torch.ones_like(cosine_N)], dim=1))
    cosine = jackknife_interval(sum_GF[:, :1], sum_GF[:, 1:])
    left_ND = x_NMD[:, CHAT] - centred.cross_V[0] / centred.base_V[0] * x_NMD[:, BASE]
    rank = effective_rank(left_ND, group_N, num_groups=num_groups)
    return SampledDifference(
        Interval(cosine.estimate[0], cosine.low[0].clamp(min=-1), cosine.high[0].clamp(max=1)), rank
    )


def effective_rank(d_ND: Tensor, group_N: Tensor, *, num_groups: int) -> Interval:
    """Participation ratio (tr C)^2 / tr C^2 of the covariance C of centred rows, float64 scalars.

    Both traces are means over pairs of rows of different groups (of |d_i|^2 |d_j|^2 and of <d_i, d_j>^2), so neither is
    biased by how few rows there are. NaN where all rows are 0 or lie in one group.
    """
    square_N = d_ND.square().sum(1)
    member_GN = torch.zeros(num_groups, len(d_ND), dtype=torch.float64)
    member_GN[group_N, torch.arange(len(d_ND))] = 1
    inner_GG = member_GN @ (d_ND @ d_ND.T).square() @ member_GN.T
    size_G = member_GN @ square_N
    traces_VF = torch.stack([_between_groups(size_G[:, None] * size_G), _between_groups(inner_GG)], dim=1)
    is_defined_V = traces_VF[:, 1] > 0
    values_V = torch.where(is_defined_V, traces_VF[:, 0] / traces_VF[:, 1], torch.nan)
    interval = leave_one_out_interval(values_V[:, None], member_GN.sum(1)[:, None])
    return Interval(*(part[0] for part in interval))._replace(low=interval.low[0].clamp(min=1))


def _between_groups(value_GG: Tensor) -> Tensor:
    """Sum over pairs of different groups, of all groups and without each: float64 [V]."""
    off_GG = value_GG - torch.diag(value_GG.diagonal())
    return torch.cat([off_GG.sum()[None], off_GG.sum() - off_GG.sum(0) - off_GG.sum(1)])
