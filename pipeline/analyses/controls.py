"""Controls of the verdict: the error rate that it states, and its calls where the right answer is known.

Four questions. How many of the chat-specific latents are false, at most, by the verdict's own account (the false
discovery rate)? How many would still be called along the direction of another latent? What is called chat-specific
where nothing can be (one model twice, or a model against itself with noise on the weights)? Does another training seed
find the same directions?

The stated rate covers the sampling of documents alone: it takes the crosscoder, the thresholds and Delta_norm as given.
The other controls cover the rest.

Shapes: D width, F latents of this crosscoder, G latents of another, C chosen latents, N = 2 D.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.verdict import NU_BY_CONSTRUCTION, Limits
from pipeline.errors import InputError
from pipeline.numerics.proportions import wilson_interval
from pipeline.schema import CONTROL_COLUMNS, SEED_COLUMNS, Control, Verdict

DEFAULT_MIN_MATCH_COSINE = 0.7
_CHUNK_NUMBERS = 1 << 24


def random_directions(decoder_FD: Tensor, chosen_C: Tensor, *, seed: int) -> Tensor:
    """For each chosen latent the direction of another one, drawn at random and orthogonal to its own; float32 [C, D].

    A direction from the whole space would hardly ever have a ratio: neither model's activations vary along it. Another
    latent's is one along which they do. Orthogonal, because a direction that overlaps with the latent's would rightly
    find it again. Unit norm; 0 where there is no other latent with a row.
    """
    unit_FD = torch.nn.functional.normalize(decoder_FD.detach().cpu().float(), dim=1)
    pool_N = unit_FD.any(dim=1).nonzero().squeeze(1)
    own_CD = unit_FD[chosen_C]
    if len(pool_N) < 2:
        return torch.zeros_like(own_CD)
    drawn_C = torch.randint(len(pool_N), (len(chosen_C),), generator=torch.Generator().manual_seed(seed))
    drawn_C = torch.where(pool_N[drawn_C] == chosen_C, (drawn_C + 1) % len(pool_N), drawn_C)
    other_CD = unit_FD[pool_N[drawn_C]]
    other_CD = other_CD - (other_CD * own_CD).sum(1, keepdim=True) * own_CD
    return torch.nn.functional.normalize(other_CD, dim=1)


class StatedError(NamedTuple):
    """The error rate of the chat-specific set, by the verdict's own account."""

    rate: float
    """The expected share of false latents in the set is at most this (false discovery rate); NaN for an empty set."""
    num_latents: int
    """Chat-specific latents."""

    @property
    def expected(self) -> float:
        """At most as many false latents are expected; 0 for an empty set."""
        return self.rate * self.num_latents if self.num_latents else 0.0


def stated_error(latents: pd.DataFrame) -> StatedError:
    """The false discovery rate that a latent table states: the largest q_value of its chat-specific latents.

    It is a bound of the expected share over samples of documents (Benjamini and Hochberg 1995), not of the share in
    this one. A q_value that is undefined counts as 1.
    """
    called = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC]
    return StatedError(float(called["q_value"].fillna(1.0).max()), len(called))


def stated_row(latents: pd.DataFrame) -> dict[str, Any]:
    """schema.CONTROL_COLUMNS of `stated_error`."""
    stated = stated_error(latents)
    note = (
        f"of {stated.num_latents} chat-specific latents at most {stated.expected:.1f} are expected to be false"
        if stated.num_latents
        else "no latent is chat-specific, so none can be wrong"
    )
    return control_row(
        Control.STATED,
        "expected share of false ones among the chat-specific latents, at most",
        (stated.rate, stated.rate * 0, stated.rate),
        num_latents=stated.num_latents,
        note=note,
    )


def random_row(latents: pd.DataFrame, scaling: pd.DataFrame | None, limits: Limits) -> dict[str, Any]:
    """Share of latents that would be chat-specific with another latent's direction in place of their own.

    The latents are those that could be called and fire in enough documents; scaling is the table of LatentScaling along
    `random_directions`, None where there is no such latent. A latent passes if its ratios are below their thresholds
    and its p-value is no larger than the largest one that the run called. Where the chat model has nothing significant
    along the direction, there is no ratio and nothing to call: that is a right answer and counts as not passed. The
    note says how many had a ratio, and how many of the same latents pass with their own direction, which is what the
    test is able to find. Latents can pass because something else in the chat model alone fires together with them: a
    share near that of the own directions means that the verdict finds when the models differ, but not in which
    direction.
    """
    num_judged = num_called = num_defined = num_own = 0
    if scaling is not None:
        known = latents.loc[
            latents["num_documents"] >= limits.min_documents, ["latent", "decoder_norm_base", "verdict"]
        ]
        judged = scaling.merge(known, on="latent")
        is_constructed = judged["decoder_norm_base"] == 0
        deciding = judged[["nu_eps", "nu_r"]].mask(is_constructed, judged[NU_BY_CONSTRUCTION], axis=0)
        is_below = (deciding["nu_eps"] < limits.nu_eps) & (
            deciding["nu_r"] < np.where(is_constructed, limits.nu_eps, limits.nu_r)
        )
        largest = latents.loc[latents["verdict"] == Verdict.CHAT_SPECIFIC, "p_value"].max()
        num_judged, num_defined = len(judged), int(deciding.notna().all(axis=1).sum())
        num_called = int((is_below & (judged["p_value"] <= largest)).sum())
        num_own = int((judged["verdict"] == Verdict.CHAT_SPECIFIC).sum())
    note = (
        f"of {num_judged} latents {num_called} would be called along another latent's direction ({num_defined} have a "
        f"defined ratio there) and {num_own} are called along their own"
    )
    return control_row(
        Control.RANDOM,
        "share of candidates called chat-specific along another latent's direction",
        share_of_trials(num_called, num_judged),
        num_latents=num_judged,
        expected=0.0,
        note=note if num_judged else "no candidate fires in enough documents",
    )


def false_calls_row(latents: pd.DataFrame, *, noise: float) -> dict[str, Any]:
    """Share of live latents called chat-specific in a pair where nothing is, and the share that the verdict states.

    noise is the relative noise on the chat model's weights; 0 for one model compared with itself. Withheld calls count:
    the rule has made them.
    """
    num_live = int((latents["verdict"] != Verdict.DEAD).sum())
    num_withheld = int((latents["verdict"] == Verdict.WITHHELD).sum())
    stated = stated_error(latents)
    num_called = stated.num_latents + num_withheld
    pair = f"the base model with noise of {noise:g} on its weights" if noise else "the base model itself"
    return control_row(
        Control.NOISE_PAIR if noise else Control.NULL_PAIR,
        "share of live latents called chat-specific though the chat model holds nothing new",
        share_of_trials(num_called, num_live),
        num_latents=num_live,
        expected=stated.expected / num_live if num_live else np.nan,
        note=f"the chat model is {pair}: all {num_called} calls are false; {num_withheld} were withheld",
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


def num_seeds_finding(seeds: pd.DataFrame) -> pd.Series:
    """In how many other seeds each chat-specific latent is chat-specific again, by latent; of schema.SEED_COLUMNS."""
    is_found = seeds["other_verdict"] == Verdict.CHAT_SPECIFIC
    found: pd.Series = is_found.groupby(seeds["latent"]).sum()
    return found


def is_replicated(num_finding: pd.Series, num_others: int) -> pd.Series:
    """Whether at least half of the other seeds find a latent again."""
    return 2 * num_finding >= num_others


def replicated_row(seeds: pd.DataFrame) -> dict[str, Any]:
    """Share of the chat-specific latents that are replicated; `seeds` is the table of all other seeds."""
    num_others, found = seeds["other"].nunique(), num_seeds_finding(seeds)
    num_replicated = int(is_replicated(found, num_others).sum())
    return control_row(
        Control.REPLICATED,
        "share of chat-specific latents that at least half of the other training seeds find again",
        share_of_trials(num_replicated, len(found)),
        num_latents=len(found),
        note=f"{num_replicated} of {len(found)} chat-specific latents are chat-specific in at least half of the "
        f"{num_others} other seeds",
    )


def seed_row(seeds: pd.DataFrame, others: pd.DataFrame, *, other: str, min_cosine: float) -> dict[str, Any]:
    """Jaccard index of the two chat-specific sets, a matched pair counted as one latent; NaN where both are empty."""
    num_both = int((seeds["other_verdict"] == Verdict.CHAT_SPECIFIC).sum())
    num_other = int((others["verdict"] == Verdict.CHAT_SPECIFIC).sum())
    num_union = len(seeds) + num_other - num_both
    return control_row(
        f"{Control.SEED} {other}",
        "Jaccard index of the chat-specific sets of two training seeds",
        share_of_trials(num_both, num_union),
        num_latents=num_union,
        note=f"{num_both} of {len(seeds)} chat-specific latents have a chat-specific match among the {num_other} of "
        f"{other} (mutual best, cosine >= {min_cosine:g})",
    )


def share_of_trials(num_hits: int, num_trials: int) -> tuple[float, float, float]:
    """(share, low, high); all NaN without a trial."""
    share = num_hits / num_trials if num_trials else np.nan
    return (share, *wilson_interval(share, num_trials))


def control_row(
    control: str,
    quantity: str,
    interval: tuple[float, float, float],
    *,
    num_latents: int,
    note: str,
    expected: float = np.nan,
) -> dict[str, Any]:
    """One row of schema.CONTROL_COLUMNS; interval is (value, low, high)."""
    values = (control, quantity, *interval, expected, num_latents, note)
    return dict(zip((column.name for column in CONTROL_COLUMNS), values, strict=True))
