"""The verdict: one table that joins decoder norms, Latent Scaling and activation statistics of every latent.

A latent that never fires is dead. One that Delta_norm calls chat-only is chat-specific if nu_eps and nu_r are below
their thresholds, otherwise an artifact of shrinkage, decoupling or both (arXiv 2504.02922, section 3: nu_eps < 0.2 and
nu_r < 0.5). It stays undecided where a ratio is undefined or the latent fires in too few documents for its ratios to
mean anything. All other latents keep their class by Delta_norm.

A latent whose base decoder row is exactly 0 was made without one (a difference SAE, a dedicated latent). Its Delta_norm
is 1 by construction and is no evidence, and a difference SAE has no reconstruction of the base model. Such a latent is
judged by the activations: chat-specific if nu_act_centred, the base model's share of what varies with the latent, is
below nu_eps's threshold, else shared. `reason` states it.
"""

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd

from pipeline.analyses.latent_scaling import DEFAULT_NU_EPS_THRESHOLD, DEFAULT_NU_R_THRESHOLD
from pipeline.errors import InputError
from pipeline.schema import LATENT_COLUMNS, Ownership, Verdict

DEFAULT_MIN_DOCUMENTS = 10
"""Below about ten documents the intervals' small-sample factor exceeds 1.2 and single documents decide the ratio."""

NU_BY_CONSTRUCTION = "nu_act_centred"
"""The ratio that judges latents whose Delta_norm is 1 by construction."""

_BY_OWNERSHIP = {
    Ownership.BASE_ONLY: Verdict.BASE_ONLY,
    Ownership.SHARED: Verdict.SHARED,
    Ownership.OTHER: Verdict.OTHER,
}


def latent_table(
    ownership: pd.DataFrame,
    scaling: pd.DataFrame,
    statistics: pd.DataFrame,
    *,
    nu_eps_threshold: float = DEFAULT_NU_EPS_THRESHOLD,
    nu_r_threshold: float = DEFAULT_NU_R_THRESHOLD,
    min_documents: int = DEFAULT_MIN_DOCUMENTS,
) -> pd.DataFrame:
    """schema.LATENT_COLUMNS, one row per latent in order, from the tables of three analyses; twins by `with_twins`.

    The columns per corpus of `statistics` follow. is_confident is true for a chat-specific latent or artifact if both
    intervals are on one side of their thresholds, or the one of nu_act_centred that judges it; else it is false.
    """
    _require_same_latents(ownership, {"Latent Scaling": scaling, "activation statistics": statistics})
    table = ownership.merge(statistics, on="latent", validate="1:1").merge(scaling, on="latent", validate="1:1")
    is_dead = table["frequency"].to_numpy() == 0
    is_chat_only = (table["ownership"] == Ownership.CHAT_ONLY).to_numpy()
    is_constructed = is_chat_only & (table["decoder_norm_base"] == 0).to_numpy()
    nu_eps, nu_r, nu_act = (table[name].to_numpy() for name in ("nu_eps", "nu_r", NU_BY_CONSTRUCTION))
    is_known = np.where(is_constructed, np.isfinite(nu_act), np.isfinite(nu_eps) & np.isfinite(nu_r))
    is_decidable = is_known & (table["num_documents"].to_numpy() >= min_documents)
    has_shrunk, is_decoupled, is_held = nu_eps >= nu_eps_threshold, nu_r >= nu_r_threshold, nu_act >= nu_eps_threshold
    conditions = [
        (is_dead, Verdict.DEAD),
        (~is_chat_only, table["ownership"].map(_BY_OWNERSHIP).to_numpy(dtype=object)),
        (~is_decidable, Verdict.UNDECIDED),
        (is_constructed & is_held, Verdict.SHARED),
        (is_constructed, Verdict.CHAT_SPECIFIC),
        (has_shrunk & is_decoupled, Verdict.BOTH),
        (has_shrunk, Verdict.SHRINKAGE),
        (is_decoupled, Verdict.DECOUPLING),
    ]
    table["verdict"] = np.select(
        [condition for condition, _ in conditions],
        [np.broadcast_to(np.asarray(verdict, dtype=object), len(table)) for _, verdict in conditions],
        default=Verdict.CHAT_SPECIFIC,
    )
    is_sure = np.where(
        is_constructed,
        _is_one_sided(table, NU_BY_CONSTRUCTION, nu_eps_threshold),
        _is_one_sided(table, "nu_eps", nu_eps_threshold) & _is_one_sided(table, "nu_r", nu_r_threshold),
    )
    table["is_confident"] = is_chat_only & ~is_dead & is_decidable & is_sure
    thresholds = {"nu_eps": nu_eps_threshold, "nu_r": nu_r_threshold}
    table["reason"] = [_reason(row, thresholds, min_documents) for row in table.to_dict("records")]
    table["twin"] = np.full(len(table), -1, dtype=np.int32)
    table["twin_cosine"] = table["twin_divergence"] = np.nan
    fixed = [column.name for column in LATENT_COLUMNS]
    return table[fixed + [name for name in statistics.columns if name not in fixed]]


def _require_same_latents(ownership: pd.DataFrame, others: dict[str, pd.DataFrame]) -> None:
    for name, other in others.items():
        if not np.array_equal(other["latent"].to_numpy(), ownership["latent"].to_numpy()):
            raise InputError(
                f"expected the same {len(ownership)} latents in the {name} table, got {len(other)}: join tables of one "
                "crosscoder"
            )


def _reason(row: dict[Hashable, Any], thresholds: dict[str, float], min_documents: int) -> str:
    """The comparison that decided, as a phrase."""
    if row["verdict"] == Verdict.DEAD:
        return "never fires on the validation rows"
    if row["ownership"] != Ownership.CHAT_ONLY:
        return f"Delta_norm {row['delta_norm']:.2f}{' by construction' if row['decoder_norm_chat'] == 0 else ''}"
    is_constructed = row["decoder_norm_base"] == 0
    if is_constructed:
        thresholds = {NU_BY_CONSTRUCTION: thresholds["nu_eps"]}
    if row["verdict"] == Verdict.UNDECIDED:
        undefined = [name for name in thresholds if not np.isfinite(row[name])]
        if row["num_documents"] < min_documents:
            return f"fires in {row['num_documents']} documents, fewer than {min_documents}"
        return f"{' and '.join(undefined)} undefined: the chat model's scale is not significantly above 0"
    measured = ", ".join(
        f"{name} {row[name]:.2f} {'<' if row[name] < threshold else '>='} {threshold:g}"
        for name, threshold in thresholds.items()
    )
    return f"{measured} (Delta_norm is 1 by construction)" if is_constructed else measured


def with_calls_withheld(table: pd.DataFrame, reason: str) -> pd.DataFrame:
    """The latent table where the models cannot be told apart: whatever the rule calls chat-specific is withheld."""
    table, is_withheld = table.copy(), table["verdict"] == Verdict.CHAT_SPECIFIC
    table.loc[is_withheld, "verdict"] = Verdict.WITHHELD
    table.loc[is_withheld, "is_confident"] = False
    table.loc[is_withheld, "reason"] = reason
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


def _is_one_sided(table: pd.DataFrame, name: str, threshold: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether the interval exists and lies wholly below, or wholly at or above, the threshold."""
    low, high = table[f"{name}_low"].to_numpy(), table[f"{name}_high"].to_numpy()
    return np.asarray((high < threshold) | (low >= threshold), dtype=np.bool_)


def verdict_counts(table: pd.DataFrame) -> dict[str, int]:
    """Latents per verdict in the order of Verdict.ALL, zeros included."""
    counts = table["verdict"].value_counts()
    return {verdict: int(counts.get(verdict, 0)) for verdict in Verdict.ALL}


def artifact_frac(table: pd.DataFrame) -> float:
    """Share of artifacts among the judged chat-only latents (not dead, undecided or withheld); NaN without one."""
    chat_only = table[table["ownership"] == Ownership.CHAT_ONLY]
    judged = chat_only[~chat_only["verdict"].isin([Verdict.DEAD, Verdict.UNDECIDED, Verdict.WITHHELD])]
    return float(judged["verdict"].isin(list(Verdict.ARTIFACTS)).mean())
