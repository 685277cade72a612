"""The tables of the causality analysis, made from its sums per conversation: KL, paired differences, curves.

Two interventions are measured on the same tokens, so the interval of their difference resamples conversations and
takes the difference within each: it is far narrower than the two intervals, which mostly reflect how conversations
differ. Every table has one row per position set; a mean is over tokens, its 95% interval over
conversations, NaN where a set has no token (or too few conversations for an interval).

Random halves and orders are single draws: intervals do not cover the choice of the draw; several draws show it.

Shapes: G conversations, I interventions, S position sets, C columns of a table.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.causal_batch import MEASURES
from pipeline.analyses.interventions import BASELINE_KINDS, Intervention
from pipeline.numerics.statistics import DEFAULT_NUM_RESAMPLES, Interval, bootstrap_interval
from pipeline.schema import CAUSALITY_COLUMNS, CAUSALITY_CURVE_COLUMNS, CAUSALITY_DIFFERENCE_COLUMNS

POSITION_SETS = ("all", "first_9", "rest")


class CausalTables(NamedTuple):
    """The tables of one crosscoder's causality analysis."""

    kl: pd.DataFrame
    """schema.CAUSALITY_COLUMNS, one row per intervention and position set."""
    differences: pd.DataFrame
    """schema.CAUSALITY_DIFFERENCE_COLUMNS, one row per contrast and position set."""
    curve: pd.DataFrame
    """schema.CAUSALITY_CURVE_COLUMNS, one row per order, number of latents and position set."""


class Contrast(NamedTuple):
    """KL(intervention) - KL(reference), each a mean over some columns of the sums."""

    intervention: str
    reference: str
    members: tuple[int, ...]
    reference_members: tuple[int, ...]


class Bootstrap(NamedTuple):
    """How intervals are drawn; equal numbers give the same resamples, so that every difference is paired."""

    num_resamples: int = DEFAULT_NUM_RESAMPLES
    seed: int = 0


def causal_tables(
    interventions: Sequence[Intervention],
    sums: Mapping[str, Tensor],
    *,
    num_latents: int,
    bootstrap: Bootstrap,
) -> CausalTables:
    """All tables of Causality's sums (`tokens_GS`, `<measure>_GIS`). num_latents = F, for the edits that use all."""
    kl_GIS, tokens_GS = sums["kl_GIS"], sums["tokens_GS"]
    sizes = [num_latents if item.kind in ("all", "error") else len(item.latents) for item in interventions]
    counts = [
        {"num_tokens": int(tokens_GS[:, s].sum()), "num_conversations": int((tokens_GS[:, s] > 0).sum())}
        for s in range(len(POSITION_SETS))
    ]
    plain = [i for i, item in enumerate(interventions) if not item.order]
    keys = [{"intervention": interventions[i].name} for i in plain]
    measured = [_rows(keys, name, _means(sums[f"{name}_GIS"][:, plain], tokens_GS, bootstrap)) for name in MEASURES]
    rows = [{**first, **second, **third} for first, second, third in zip(*measured, strict=True)]
    kl = [{**row, **counts[row["place"]], "num_latents": sizes[plain[row["item"]]]} for row in rows]
    found = contrasts([interventions[i] for i in plain])
    differences = [
        {**row, **counts[row["place"]]}
        for row in _rows(
            [{"intervention": one.intervention, "reference": one.reference} for one in found],
            "difference",
            _means(_contrasted(kl_GIS[:, plain], found), tokens_GS, bootstrap),
        )
    ]
    return CausalTables(
        pd.DataFrame(kl, columns=[column.name for column in CAUSALITY_COLUMNS]),
        pd.DataFrame(differences, columns=[column.name for column in CAUSALITY_DIFFERENCE_COLUMNS]),
        _curve_table(interventions, sizes, sums, bootstrap),
    )


def contrasts(interventions: Sequence[Intervention]) -> list[Contrast]:
    """The differences that get an interval, where both sides were measured.

    worst - best (each ranking, replace and add), random - best and worst - random (each random half, and their mean),
    directions of the difference - all, and none - everything else: by how much each intervention lowers the KL.
    """
    place = {item.name: i for i, item in enumerate(interventions)}
    sides: dict[str, tuple[int, ...]] = {name: (i,) for name, i in place.items()}
    pairs: list[tuple[str, str]] = []
    for kind in ("replace", "add"):
        rankings = (f"{kind}{suffix}" for suffix in ("", "_by_delta_norm"))
        pairs += [(f"worst_half_{ranking}", f"best_half_{ranking}") for ranking in rankings]
        drawn = [name for name in place if name.startswith("random_half_") and name.endswith(f"_{kind}")]
        if len(drawn) > 1:
            sides[f"random_half_mean_{kind}"] = tuple(place[name] for name in drawn)
            drawn.append(f"random_half_mean_{kind}")
        for name in drawn:
            pairs += [(name, f"best_half_{kind}"), (f"worst_half_{kind}", name)]
    pairs += [(kind, "all") for kind in BASELINE_KINDS]
    pairs += [("none", name) for name in place if name not in ("none", "chat", "base")]
    return [Contrast(a, b, sides[a], sides[b]) for a, b in pairs if a in sides and b in sides]


def _contrasted(kl_GIS: Tensor, found: Sequence[Contrast]) -> Tensor:
    """Summed KL differences per conversation [G, number of contrasts, S]."""
    if not found:
        return kl_GIS[:, :0]
    differences = [
        kl_GIS[:, list(one.members)].mean(1) - kl_GIS[:, list(one.reference_members)].mean(1) for one in found
    ]
    return torch.stack(differences, dim=1)


def _curve_table(
    interventions: Sequence[Intervention], sizes: Sequence[int], sums: Mapping[str, Tensor], bootstrap: Bootstrap
) -> pd.DataFrame:
    """KL by number of latents added, and by how much each latent added since the point before lowers it."""
    points = [i for i, item in enumerate(interventions) if item.order]
    kl_GIS, tokens_GS = sums["kl_GIS"][:, points], sums["tokens_GS"]
    spent_GIS = torch.full_like(kl_GIS, torch.nan)
    for here, i in enumerate(points):
        if sizes[i]:
            spent_GIS[:, here] = (kl_GIS[:, here - 1] - kl_GIS[:, here]) / (sizes[i] - sizes[points[here - 1]])
    keys = [{"order": interventions[i].order, "num_latents": sizes[i]} for i in points]
    kl = _rows(keys, "kl", _means(kl_GIS, tokens_GS, bootstrap))
    spent = _rows(keys, "kl_per_latent", _means(spent_GIS, tokens_GS, bootstrap))
    rows = [{**a, **b} for a, b in zip(kl, spent, strict=True)]
    return pd.DataFrame(rows, columns=[column.name for column in CAUSALITY_CURVE_COLUMNS])


def _means(value_GIS: Tensor, tokens_GS: Tensor, bootstrap: Bootstrap) -> Interval:
    """Mean per token of each item and position set with its interval, float64 [I, S]."""
    shape = value_GIS.shape[1:]
    if not value_GIS.numel():
        return Interval(*(torch.zeros(shape, dtype=torch.float64) for _ in range(3)))
    numerator_GC = value_GIS.flatten(1)
    denominator_GC = tokens_GS[:, None, :].expand_as(value_GIS).flatten(1)
    interval = bootstrap_interval(
        numerator_GC, denominator_GC, num_resamples=bootstrap.num_resamples, seed=bootstrap.seed
    )
    mean_C = numerator_GC.sum(0) / denominator_GC.sum(0)
    return Interval(mean_C.view(shape), interval.low.view(shape), interval.high.view(shape))


def _rows(keys: Sequence[Mapping[str, Any]], name: str, means: Interval) -> list[dict[str, Any]]:
    """One dict per item and position set; `item` and `place` are their indices."""
    return [
        {
            **key,
            "positions": positions,
            name: float(means.estimate[i, s]),
            f"{name}_low": float(means.low[i, s]),
            f"{name}_high": float(means.high[i, s]),
            "item": i,
            "place": s,
        }
        for i, key in enumerate(keys)
        for s, positions in enumerate(POSITION_SETS)
    ]
