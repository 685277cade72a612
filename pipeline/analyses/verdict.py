"""The verdict: one table that joins decoder norms, Latent Scaling and activation statistics of every latent.

A latent that never fires is dead. For every other one the rows are asked whether the base model holds it, along the
chat model's direction: its share of the concept (nu_eps) below 0.2 in size, and that of its reconstruction (nu_r) below
0.5 (arXiv 2504.02922, section 3). Two rules draw the verdict from the answer.

`evidence` (the default). "The base model does not hold it" is accepted at a stated false discovery rate
(Benjamini-Hochberg over `p_value`). It makes a latent

- chat-specific where Delta_norm > 0.6, on the grounds of norm and evidence (Delta_norm >= 0.9) or of evidence alone;
- rotated where Delta_norm is smaller: both models have a decoder row of about one length, in different directions. A
  copy of a model with a rotated residual stream consists of such latents: it computes the same, so none of it is new.

A chat-only latent (Delta_norm >= 0.9) without that evidence is an artifact of shrinkage, decoupling or both if a ratio
is beyond its threshold, else undecided. Above 0.6 a latent is stronger in chat where the whole interval of the base
model's share (nu_act_centred) lies below 1 and not below nu_eps's threshold. Latents with Delta_norm < 0.4 are asked
the same with the models exchanged, and are base-only if the chat model does not hold them. All others keep their class
by Delta_norm.

`paper`. Only chat-only latents are judged, by the ratios themselves: chat-specific if both are below their thresholds.

False discoveries are counted in families that are set before a validation row is read: latents that could be called
chat-specific, those that could be called rotated, those that could be called base-only. One family for all would let
many sure calls of one kind hide the false ones of another.

A latent whose base decoder row is exactly 0 was made without one (a difference SAE, a dedicated latent). Its Delta_norm
is 1 by construction and is no evidence. nu_act_centred judges it in place of both ratios.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.latent_scaling import DEFAULT_NU_EPS_THRESHOLD, DEFAULT_NU_R_THRESHOLD
from pipeline.errors import InputError
from pipeline.numerics.significance import q_values
from pipeline.schema import CHECKED_NU_COLUMNS, DELTA_NORM_RANGES, LATENT_COLUMNS, Grounds, Ownership, Verdict

NU_BY_CONSTRUCTION = "nu_act_centred"
"""The ratio that judges latents whose Delta_norm is 1 by construction: the base model's share."""
SHARED_LOW, SHARED_HIGH = DELTA_NORM_RANGES[Ownership.SHARED]
"""Below the one a latent can be called base-only, above the other chat-specific."""
BASE_ONLY_HIGH = DELTA_NORM_RANGES[Ownership.BASE_ONLY][1]

_BY_OWNERSHIP = {
    Ownership.BASE_ONLY: Verdict.BASE_ONLY,
    Ownership.SHARED: Verdict.SHARED,
    Ownership.OTHER: Verdict.OTHER,
    Ownership.CHAT_ONLY: Verdict.UNDECIDED,
}

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


class Limits(NamedTuple):
    """The numbers that a verdict depends on."""

    nu_eps: float = DEFAULT_NU_EPS_THRESHOLD
    nu_r: float = DEFAULT_NU_R_THRESHOLD
    min_documents: int = 10
    """Below about ten documents the small-sample factor exceeds 1.2, and single documents decide a ratio."""
    false_discovery_rate: float = 0.05


DEFAULT_LIMITS = Limits()


def latent_table(
    ownership: pd.DataFrame,
    scaling: pd.DataFrame,
    statistics: pd.DataFrame,
    *,
    base_scaling: pd.DataFrame | None = None,
    limits: Limits = DEFAULT_LIMITS,
    rule: str = "evidence",
) -> pd.DataFrame:
    """schema.LATENT_COLUMNS, one row per latent in order, from the tables of three analyses; twins by `with_twins`.

    base_scaling is LatentScaling with owner=BASE of the latents with Delta_norm < 0.4, or None: base-only is then a
    matter of Delta_norm. The columns per corpus of `statistics` follow.
    """
    _require_same_latents(ownership, {"Latent Scaling": scaling, "activation statistics": statistics})
    table = ownership.merge(statistics, on="latent", validate="1:1").merge(scaling, on="latent", validate="1:1")
    table["p_value_base"] = np.nan
    if base_scaling is not None:
        table["p_value_base"] = table["latent"].map(base_scaling.set_index("latent")["p_value"])
    _add_q_values(table, limits)
    table["verdict"] = CALLS[rule](table, limits)
    table["grounds"] = _grounds(table, limits)
    table["is_confident"] = _is_confident(table, limits)
    table["reason"] = [_reason(row, rule, limits) for row in table.to_dict("records")]
    table["twin"] = np.full(len(table), -1, dtype=np.int32)
    table[["twin_cosine", "twin_divergence", *(column.name for column in CHECKED_NU_COLUMNS)]] = np.nan
    fixed = [column.name for column in LATENT_COLUMNS]
    return table[fixed + [name for name in statistics.columns if name not in fixed]]


def _require_same_latents(ownership: pd.DataFrame, others: dict[str, pd.DataFrame]) -> None:
    for name, other in others.items():
        if not np.array_equal(other["latent"].to_numpy(), ownership["latent"].to_numpy()):
            raise InputError(
                f"expected the same {len(ownership)} latents in the {name} table, got {len(other)}: join tables of one "
                "crosscoder"
            )


def _add_q_values(table: pd.DataFrame, limits: Limits) -> None:
    """Adds q_value, q_held and q_value_base: each over the latents that are judged and could be called."""
    is_judged = _is_judged(table, limits)
    is_candidate = (table["delta_norm"] > SHARED_HIGH).to_numpy()
    for name, source, families in (
        ("q_value", "p_value", (is_candidate, ~is_candidate)),
        ("q_held", "p_held", (np.ones(len(table), dtype=np.bool_),)),
        ("q_value_base", "p_value_base", ((table["delta_norm"] < SHARED_LOW).to_numpy(),)),
    ):
        q = np.full(len(table), np.nan)
        for family in families:
            own = family & is_judged
            q[own] = q_values(torch.from_numpy(table.loc[own, source].to_numpy(dtype=np.float64, copy=True))).numpy()
        table[name] = q


def _is_judged(table: pd.DataFrame, limits: Limits) -> Mask:
    """Whether a latent fires, in enough documents."""
    is_live = table["frequency"].to_numpy() > 0
    return np.asarray(is_live & (table["num_documents"].to_numpy() >= limits.min_documents), dtype=np.bool_)


def _is_constructed(table: pd.DataFrame) -> Mask:
    """Whether Delta_norm is 1 by construction."""
    is_chat_only = table["ownership"] == Ownership.CHAT_ONLY
    return np.asarray(is_chat_only & (table["decoder_norm_base"] == 0), dtype=np.bool_)


def by_evidence(table: pd.DataFrame, limits: Limits) -> np.ndarray:
    """Verdict of each latent by the rule `evidence`; `table` is a latent table, its verdict aside."""
    rate, delta_norm = limits.false_discovery_rate, table["delta_norm"].to_numpy()
    nu_eps, nu_r, share = (table[name].abs().to_numpy() for name in ("nu_eps", "nu_r", NU_BY_CONSTRUCTION))
    is_chat_only = (table["ownership"] == Ownership.CHAT_ONLY).to_numpy()
    is_constructed, is_absent = _is_constructed(table), (table["q_value"] <= rate).to_numpy()
    is_known = _is_judged(table, limits) & table["p_value"].notna().to_numpy()
    is_base_asked = table["q_value_base"].notna().to_numpy()
    low, high = (table[f"{NU_BY_CONSTRUCTION}_{end}"].to_numpy() for end in ("low", "high"))
    is_stronger = is_known & (delta_norm > SHARED_HIGH) & (low >= limits.nu_eps) & (high < 1)
    has_shrunk, is_decoupled = nu_eps >= limits.nu_eps, nu_r >= limits.nu_r
    return _first_of(
        [
            ((table["frequency"] == 0).to_numpy(), Verdict.DEAD),
            (is_absent & (delta_norm > SHARED_HIGH), Verdict.CHAT_SPECIFIC),
            ((table["q_value_base"] <= rate).to_numpy(), Verdict.BASE_ONLY),
            (is_absent & (delta_norm > BASE_ONLY_HIGH), Verdict.ROTATED),
            (is_chat_only & ~is_known, Verdict.UNDECIDED),
            (is_stronger & (is_constructed | ~is_chat_only), Verdict.STRONGER),
            (is_constructed & (share >= limits.nu_eps), Verdict.SHARED),
            (is_constructed, Verdict.UNDECIDED),
            (is_chat_only & has_shrunk & is_decoupled, Verdict.BOTH),
            (is_chat_only & has_shrunk, Verdict.SHRINKAGE),
            (is_chat_only & is_decoupled, Verdict.DECOUPLING),
            (is_base_asked & (delta_norm <= BASE_ONLY_HIGH), Verdict.OTHER),
        ],
        otherwise=table["ownership"].map(_BY_OWNERSHIP).to_numpy(dtype=object),
    )


def by_paper(table: pd.DataFrame, limits: Limits) -> np.ndarray:
    """Verdict of each latent by the rule `paper`; `table` is a latent table, its verdict aside."""
    nu_eps, nu_r, share = (table[name].to_numpy() for name in ("nu_eps", "nu_r", NU_BY_CONSTRUCTION))
    is_chat_only, is_constructed = (table["ownership"] == Ownership.CHAT_ONLY).to_numpy(), _is_constructed(table)
    is_known = np.where(is_constructed, np.isfinite(share), np.isfinite(nu_eps) & np.isfinite(nu_r))
    has_shrunk, is_decoupled = nu_eps >= limits.nu_eps, nu_r >= limits.nu_r
    return _first_of(
        [
            ((table["frequency"] == 0).to_numpy(), Verdict.DEAD),
            (~is_chat_only, table["ownership"].map(_BY_OWNERSHIP).to_numpy(dtype=object)),
            (~(is_known & _is_judged(table, limits)), Verdict.UNDECIDED),
            (is_constructed & (share >= limits.nu_eps), Verdict.SHARED),
            (is_constructed, Verdict.CHAT_SPECIFIC),
            (has_shrunk & is_decoupled, Verdict.BOTH),
            (has_shrunk, Verdict.SHRINKAGE),
            (is_decoupled, Verdict.DECOUPLING),
        ],
        otherwise=np.full(len(table), Verdict.CHAT_SPECIFIC, dtype=object),
    )


CALLS: Mapping[str, Callable[[pd.DataFrame, Limits], np.ndarray]] = {"evidence": by_evidence, "paper": by_paper}
"""Verdicts by the name of the rule."""


def _first_of(conditions: list[tuple[Mask, str | np.ndarray]], *, otherwise: np.ndarray) -> np.ndarray:
    """For each latent the verdict of the first condition that holds."""
    verdicts = [np.broadcast_to(np.asarray(verdict, dtype=object), otherwise.shape) for _, verdict in conditions]
    return np.select([condition for condition, _ in conditions], verdicts, default=otherwise)


def _grounds(table: pd.DataFrame, limits: Limits) -> np.ndarray:
    """schema.Grounds of each latent."""
    is_chat = (table["verdict"] == Verdict.CHAT_SPECIFIC).to_numpy()
    is_base = (table["verdict"] == Verdict.BASE_ONLY).to_numpy() & (
        table["q_value_base"] <= limits.false_discovery_rate
    ).to_numpy()
    has_norm = (table["ownership"].isin([Ownership.CHAT_ONLY, Ownership.BASE_ONLY])).to_numpy()
    by_norm = has_norm & ~_is_constructed(table) & (table["decoder_norm_chat"] > 0).to_numpy()
    return _first_of(
        [((is_chat | is_base) & by_norm, Grounds.NORM_AND_EVIDENCE), (is_chat | is_base, Grounds.EVIDENCE_ALONE)],
        otherwise=np.full(len(table), Grounds.NONE, dtype=object),
    )


def _is_confident(table: pd.DataFrame, limits: Limits) -> Mask:
    """Whether a call holds at the false discovery rate: that the base (or chat) model lacks the latent, or holds it."""
    rate, verdict = limits.false_discovery_rate, table["verdict"]
    lacks = verdict.isin([Verdict.CHAT_SPECIFIC, Verdict.ROTATED]) & (table["q_value"] <= rate)
    holds = verdict.isin([*Verdict.ARTIFACTS, Verdict.SHARED, Verdict.STRONGER]) & (table["q_held"] <= rate)
    is_base = (verdict == Verdict.BASE_ONLY) & (table["q_value_base"] <= rate)
    return (lacks | holds | is_base).to_numpy(dtype=np.bool_)


def _reason(row: dict[Hashable, Any], rule: str, limits: Limits) -> str:
    """The comparison that decided, as a phrase."""
    verdict, norm = row["verdict"], f"Delta_norm {row['delta_norm']:.2f}"
    if verdict == Verdict.DEAD:
        return "never fires on the validation rows"
    is_judged_by_ratios = row["ownership"] == Ownership.CHAT_ONLY or verdict in (Verdict.CHAT_SPECIFIC, Verdict.ROTATED)
    if verdict == Verdict.STRONGER:
        low, high = row[f"{NU_BY_CONSTRUCTION}_low"], row[f"{NU_BY_CONSTRUCTION}_high"]
        return f"the base model's share is {row[NU_BY_CONSTRUCTION]:.2f} [{low:.2f}, {high:.2f}], {norm}"
    if not is_judged_by_ratios:
        by_construction = " by construction" if row["decoder_norm_chat"] == 0 else ""
        q = row["q_value_base"]
        return f"{norm}{by_construction}" + ("" if np.isnan(q) else f", q {q:.2g} that the chat model lacks it")
    is_constructed = row["decoder_norm_base"] == 0
    thresholds = {"nu_eps": limits.nu_eps, "nu_r": limits.nu_r}
    if is_constructed:
        thresholds = {NU_BY_CONSTRUCTION: limits.nu_eps}
    if row["num_documents"] < limits.min_documents:
        return f"fires in {row['num_documents']} documents, fewer than {limits.min_documents}"
    undefined = [name for name in thresholds if not np.isfinite(row[name])]
    if undefined:
        return f"{' and '.join(undefined)} undefined: the chat model's scale is not significantly above 0"
    compared = [_compared(name, row[name], limit, rule == "evidence") for name, limit in thresholds.items()]
    if rule == "evidence" and verdict not in (Verdict.SHARED, *Verdict.ARTIFACTS):
        compared.append(f"q {row['q_value']:.2g}")
    if is_constructed:
        return f"{', '.join(compared)} (Delta_norm is 1 by construction)"
    is_norm_told = verdict == Verdict.ROTATED or row["grounds"] == Grounds.EVIDENCE_ALONE
    return ", ".join([*compared, norm] if is_norm_told else compared)


def _compared(name: str, value: float, limit: float, is_two_sided: bool) -> str:
    if is_two_sided and value < 0:
        name, value = f"|{name}|", -value
    return f"{name} {value:.2f} {'<' if value < limit else '>='} {limit:g}"


def with_calls_withheld(table: pd.DataFrame, reason: str) -> pd.DataFrame:
    """The latent table where the models cannot be told apart: no latent may say that they differ.

    What the rule calls chat-specific is withheld; what it calls base-only, rotated or stronger in chat becomes other.
    """
    table, is_specific = table.copy(), table["verdict"] == Verdict.CHAT_SPECIFIC
    is_difference = table["verdict"].isin([Verdict.BASE_ONLY, Verdict.ROTATED, Verdict.STRONGER])
    table.loc[is_specific, "verdict"] = Verdict.WITHHELD
    table.loc[is_difference, "verdict"] = Verdict.OTHER
    table.loc[is_specific | is_difference, ["is_confident", "grounds", "reason"]] = (False, Grounds.NONE, reason)
    return table


def with_twins(table: pd.DataFrame, twins: pd.DataFrame) -> pd.DataFrame:
    """The latent table with each latent's twin of highest cosine, from either side of the pairs (TWIN_COLUMNS)."""
    sides = {"latent_chat": "latent", "latent_base": "twin"}, {"latent_base": "latent", "latent_chat": "twin"}
    both = pd.concat([twins.rename(columns=names) for names in sides])
    best = both.sort_values("cosine", ascending=False, kind="stable").drop_duplicates("latent").set_index("latent")
    table = table.copy()
    table["twin"] = table["latent"].map(best["twin"]).fillna(-1).astype("int32")
    table["twin_cosine"] = table["latent"].map(best["cosine"])
    table["twin_divergence"] = table["latent"].map(best["divergence"])
    return table


def verdict_counts(table: pd.DataFrame) -> dict[str, int]:
    """Latents per verdict in the order of Verdict.ALL, zeros included."""
    counts = table["verdict"].value_counts()
    return {verdict: int(counts.get(verdict, 0)) for verdict in Verdict.ALL}


def artifact_frac(table: pd.DataFrame) -> float:
    """Share of artifacts among the judged chat-only latents (not dead, undecided or withheld); NaN without one."""
    chat_only = table[table["ownership"] == Ownership.CHAT_ONLY]
    judged = chat_only[~chat_only["verdict"].isin([Verdict.DEAD, Verdict.UNDECIDED, Verdict.WITHHELD])]
    return float(judged["verdict"].isin(list(Verdict.ARTIFACTS)).mean())
