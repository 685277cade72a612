"""Controls of the verdict: the error rate that it states, and its calls where the right answer is known.

Four questions. How many of the chat-specific latents are artifacts, by the verdict's own account (the false discovery
rate, from the bootstrap behind each latent)? How many of the chat-only latents would be called chat-specific with a
random direction, orthogonal to theirs, in place of the decoder's? What is called chat-specific where nothing can be
(one model twice, or a model against itself with noise on the weights)? Does another training seed find the same
directions?

The stated rate covers the sampling of documents alone: it takes the crosscoder, the thresholds and Delta_norm as given,
and a flat prior for every ratio. The other controls cover the rest.

Shapes: D width, F latents of this crosscoder, G latents of another, C chosen latents, N = 2 D.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.verdict import NU_BY_CONSTRUCTION
from pipeline.errors import InputError
from pipeline.numerics.proportions import wilson_interval
from pipeline.schema import CONTROL_COLUMNS, SEED_COLUMNS, Control, Verdict

DEFAULT_MIN_MATCH_COSINE = 0.7
_CHUNK_NUMBERS = 1 << 24


def random_directions(own_FD: Tensor, *, seed: int) -> Tensor:
    """One random direction of norm 1 per latent, orthogonal to the latent's own row of own_FD; float32 [F, D].

    Orthogonal, because a direction that overlaps with the latent's would rightly find it again.
    """
    own_FD = torch.nn.functional.normalize(own_FD.detach().cpu().float(), dim=1)
    random_FD = torch.randn(own_FD.shape, generator=torch.Generator().manual_seed(seed))
    random_FD -= (random_FD * own_FD).sum(1, keepdim=True) * own_FD
    return torch.nn.functional.normalize(random_FD, dim=1)


class StatedError(NamedTuple):
    """The error rate of the chat-specific set, by the verdict's own account."""

    rate: float
    """Expected share of artifacts in the set (false discovery rate); NaN for an empty set."""
    low: float
    high: float
    """Two standard deviations of the share, the latents' errors taken as independent; within [0, 1]."""
    num_latents: int
    """Chat-specific latents."""
    expected: float
    """Expected number of artifacts among them."""


def stated_error(latents: pd.DataFrame) -> StatedError:
    """The false discovery rate that a latent table states: the mean artifact_probability of its chat-specific latents.

    A probability that is undefined counts as 1.
    """
    called = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC]
    wrong = called["artifact_probability"].fillna(1.0).to_numpy(dtype=np.float64)
    if not len(wrong):
        return StatedError(np.nan, np.nan, np.nan, 0, 0.0)
    rate, spread = float(wrong.mean()), float(np.sqrt((wrong * (1 - wrong)).sum()) / len(wrong))
    return StatedError(rate, max(0.0, rate - 2 * spread), min(1.0, rate + 2 * spread), len(wrong), float(wrong.sum()))


def stated_row(latents: pd.DataFrame) -> dict[str, Any]:
    """schema.CONTROL_COLUMNS of `stated_error`."""
    stated = stated_error(latents)
    note = (
        f"of {stated.num_latents} chat-specific latents {stated.expected:.1f} are expected to be artifacts"
        if stated.num_latents
        else "no latent is chat-specific, so none can be wrong"
    )
    return _row(
        Control.STATED,
        "expected share of artifacts among the chat-specific latents",
        (stated.rate, stated.low, stated.high),
        num_latents=stated.num_latents,
        note=note,
    )


def random_row(
    latents: pd.DataFrame, scaling: pd.DataFrame | None, *, thresholds: tuple[float, float], min_documents: int
) -> dict[str, Any]:
    """Share of the chat-only latents that would be chat-specific with a random direction in place of the decoder's.

    scaling is the table of LatentScaling with `random_directions` for the chat-only latents; None where there are none.
    A latent whose ratios are undefined is not called chat-specific. Others can pass because something else in the chat
    model alone fires together with the latent: a share near that of the decoder's own directions means that the verdict
    finds when the models differ, but not in which direction.
    """
    num_judged = num_called = num_undefined = 0
    if scaling is not None:
        known = latents[["latent", "num_documents", "decoder_norm_base"]]
        judged = scaling.merge(known[known["num_documents"] >= min_documents], on="latent")
        is_constructed = judged["decoder_norm_base"] == 0
        deciding = judged[["nu_eps", "nu_r"]].mask(is_constructed, judged[NU_BY_CONSTRUCTION], axis=0)
        limits = np.where(is_constructed, thresholds[0], thresholds[1])
        num_judged = len(judged)
        num_called = int(((deciding["nu_eps"] < thresholds[0]) & (deciding["nu_r"] < limits)).sum())
        num_undefined = int(deciding.isna().any(axis=1).sum())
    note = f"of {num_judged} chat-only latents {num_called} would be called; {num_undefined} have no defined ratio"
    return _row(
        Control.RANDOM,
        "share of chat-only latents called chat-specific with a random direction",
        _share(num_called, num_judged),
        num_latents=num_judged,
        expected=0.0,
        note=note if num_judged else "no chat-only latent fires in enough documents",
    )


def false_calls_row(latents: pd.DataFrame, *, noise: float) -> dict[str, Any]:
    """Share of live latents called chat-specific in a pair where nothing is, and the share that the verdict states.

    noise is the relative noise on the chat model's weights; 0 for one model compared with itself.
    """
    num_live = int((latents["verdict"] != Verdict.DEAD).sum())
    stated = stated_error(latents)
    pair = f"the base model with noise of {noise:g} on its weights" if noise else "the base model itself"
    return _row(
        Control.NOISE_PAIR if noise else Control.NULL_PAIR,
        "share of live latents called chat-specific though the chat model holds nothing new",
        _share(stated.num_latents, num_live),
        num_latents=num_live,
        expected=stated.expected / num_live if num_live else np.nan,
        note=f"the chat model is {pair}: all {stated.num_latents} chat-specific latents are false",
    )


class Matches(NamedTuple):
    """The partners of chosen latents in another crosscoder; both tensors [C]."""

    partner: Tensor
    """int64; -1 where the best latent of the other side prefers another one, or the cosine is too small."""
    cosine: Tensor
    """float64, with the best latent of the other side, partner or not; NaN where a decoder row is 0."""


def match_latents(
    W_dec_FMD: Tensor, other_GMD: Tensor, chosen: Sequence[int], *, min_cosine: float = DEFAULT_MIN_MATCH_COSINE
) -> Matches:
    """Mutual best matches by the cosine of [d^base, d^chat]: one-to-one, and the same from either side."""
    if W_dec_FMD.shape[1:] != other_GMD.shape[1:]:
        raise InputError(
            f"expected decoders of one pair, got {list(W_dec_FMD.shape)} and {list(other_GMD.shape)}: match "
            "crosscoders of the same activations"
        )
    unit_FN, unit_GN = (
        torch.nn.functional.normalize(decoder.detach().cpu().float().flatten(1), dim=1)
        for decoder in (W_dec_FMD, other_GMD)
    )
    index_C = torch.tensor(list(chosen), dtype=torch.int64)
    best_C, cosine_C = _best(unit_FN[index_C], unit_GN)
    back_C, _ = _best(unit_GN[best_C], unit_FN)
    is_partner_C = (back_C == index_C) & (cosine_C >= min_cosine)
    cosine_C = torch.where(unit_FN[index_C].any(dim=1), cosine_C, torch.nan)
    return Matches(torch.where(is_partner_C, best_C, -1), cosine_C)


def _best(unit_CN: Tensor, unit_GN: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the most parallel row of unit_GN, its cosine) for every row of unit_CN."""
    size = max(1, _CHUNK_NUMBERS // len(unit_GN))
    parts = torch.split(unit_CN, size) if len(unit_CN) else []
    found = [(part @ unit_GN.T).max(dim=1) for part in parts]
    if not found:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found]).double()


def seed_table(latents: pd.DataFrame, others: pd.DataFrame, matches: Matches, *, other: str) -> pd.DataFrame:
    """schema.SEED_COLUMNS: each chat-specific latent and its match in the crosscoder `other` of another seed.

    `matches` are those of the chat-specific latents in the table's order.
    """
    called = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC]
    verdicts = others.set_index("latent")["verdict"]
    partner = matches.partner.numpy()
    return pd.DataFrame(
        {
            "other": [other] * len(called),
            "latent": called["latent"].to_numpy(),
            "other_latent": partner.astype(np.int32),
            "other_verdict": [verdicts[index] if index >= 0 else None for index in partner],
            "cosine": matches.cosine.numpy(),
        },
        columns=[column.name for column in SEED_COLUMNS],
    )


def seed_row(seeds: pd.DataFrame, others: pd.DataFrame, *, other: str, min_cosine: float) -> dict[str, Any]:
    """Jaccard index of the two chat-specific sets, a matched pair counted as one latent; NaN where both are empty."""
    num_both = int((seeds["other_verdict"] == Verdict.CHAT_SPECIFIC).sum())
    num_other = int((others["verdict"] == Verdict.CHAT_SPECIFIC).sum())
    num_union = len(seeds) + num_other - num_both
    return _row(
        f"{Control.SEED} {other}",
        "Jaccard index of the chat-specific sets of two training seeds",
        _share(num_both, num_union),
        num_latents=num_union,
        note=f"{num_both} of {len(seeds)} chat-specific latents have a chat-specific match among the {num_other} of "
        f"{other} (mutual best, cosine >= {min_cosine:g})",
    )


def _share(num_hits: int, num_trials: int) -> tuple[float, float, float]:
    """(share, low, high); all NaN without a trial."""
    share = num_hits / num_trials if num_trials else np.nan
    return (share, *wilson_interval(share, num_trials))


def _row(
    control: str,
    quantity: str,
    interval: tuple[float, float, float],
    *,
    num_latents: int,
    note: str,
    expected: float = np.nan,
) -> dict[str, Any]:
    values = (control, quantity, *interval, expected, num_latents, note)
    return dict(zip((column.name for column in CONTROL_COLUMNS), values, strict=True))
