"""Which latents an analysis uses, and in which order: every choice from a latent table is made here.

Causality divides and ranks the chat-only latents, steering and automatic interpretation take the most chat-specific
ones, and tables of examples list latents by verdict. Nothing here measures anything.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from pipeline.errors import InputError
from pipeline.schema import Ownership, Verdict

NU_RANGE = (-0.1, 2.0)
"""Latents whose nu_eps or nu_r is outside are left out of causality's set: their ratio is noise."""

_LISTED_AFTER_CHAT_SPECIFIC = (
    *Verdict.ARTIFACTS,
    Verdict.UNDECIDED,
    Verdict.WITHHELD,
    Verdict.STRONGER,
    Verdict.ROTATED,
    Verdict.BASE_ONLY,
)


def require_latents(latents: Iterable[int], num_latents: int, where: str) -> None:
    """InputError for indices that a crosscoder of num_latents latents does not have; `where` begins the message."""
    wrong = [latent for latent in latents if not 0 <= latent < num_latents]
    if wrong:
        raise InputError(
            f"{where}: expected latents between 0 and {num_latents - 1}, got {wrong}; take them from this crosscoder's "
            "own latent table"
        )


def latents_with(table: pd.DataFrame, verdicts: Sequence[str]) -> list[int]:
    """Indices of the latents with one of these verdicts, highest Delta_norm first; may be empty."""
    unknown = [verdict for verdict in verdicts if verdict not in Verdict.ALL]
    if unknown:
        raise InputError(f"expected verdicts of {', '.join(Verdict.ALL)}, got {', '.join(unknown)}: use these names")
    return [int(latent) for latent in _by_delta_norm(table[table["verdict"].isin(list(verdicts))])["latent"]]


def listed_latents(
    table: pd.DataFrame, *, named: Literal["all"] | Sequence[int], max_latents: int, where: str
) -> tuple[int, ...]:
    """Latents whose contexts and tokens are written: up to max_latents that are not shared, and those named.

    Chat-specific latents come first, then the others by Delta_norm. `where` begins the message about a wrong name.
    """
    if isinstance(named, str):
        return tuple(int(latent) for latent in table["latent"])
    require_latents(named, len(table), where)
    chosen = latents_with(table, [Verdict.CHAT_SPECIFIC])
    chosen += latents_with(table, [*_LISTED_AFTER_CHAT_SPECIFIC])
    return tuple(dict.fromkeys([*chosen[:max_latents], *named]))


def most_specific_latents(latents: pd.DataFrame, num: int) -> tuple[int, ...]:
    """Up to num chat-specific latents, best evidence first (`rank_by_nu`); empty where there is none."""
    specific = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC]
    return tuple(int(latent) for latent in rank_by_nu(specific)[:num])


def interpreted_latents(table: pd.DataFrame, *, named: Sequence[int], max_latents: int) -> tuple[int, ...]:
    """The latents named, each once, or else the first max_latents chat-specific ones, highest Delta_norm first."""
    require_latents(named, len(table), "analyses.autointerp.latents")
    return tuple(dict.fromkeys(named)) or tuple(latents_with(table, [Verdict.CHAT_SPECIFIC])[:max_latents])


def causality_latents(latents: pd.DataFrame, *, num_latents: int | None = None, min_latents: int = 0) -> pd.DataFrame:
    """The rows that causality divides and ranks: chat-only latents, filled up to min_latents.

    Of the chat-only latents the num_latents of highest Delta_norm are taken, so that the sets of two crosscoders are
    equally large. Where fewer than min_latents are chat-only, the latents of next highest Delta_norm follow: a
    crosscoder with a handful of chat-only latents still has halves to compare, but its ranks then mix chat-only latents
    with others. Latents whose nu_eps or nu_r is undefined or outside NU_RANGE never qualify. Of a dictionary without
    base rows all live latents are chat-only, and those of smallest |nu_act| are taken, as in the paper's code.
    """
    columns = ("latent", "ownership", "delta_norm", "nu_eps", "nu_r", "nu_act", "decoder_norm_base", "frequency")
    missing = [name for name in columns if name not in latents.columns]
    if missing:
        raise InputError(
            f"expected a latent table with {', '.join(columns)}, {', '.join(missing)} is missing; run the analyses of "
            "this version again"
        )
    if is_of_chat_alone(latents):
        known = latents[(latents["frequency"] > 0) & latents["nu_act"].notna()]
        return known.iloc[_order(known, known["nu_act"].abs().to_numpy())[:num_latents]]
    qualified = _by_delta_norm(latents[latents["nu_eps"].between(*NU_RANGE) & latents["nu_r"].between(*NU_RANGE)])
    is_chat_only = qualified["ownership"] == Ownership.CHAT_ONLY
    chosen = qualified[is_chat_only].head(len(qualified) if num_latents is None else num_latents)
    others = qualified.drop(chosen.index)
    return pd.concat([chosen, others.head(max(0, min_latents - len(chosen)))])


def equivalence_latents(latents: pd.DataFrame, *, num_each: int, seed: int) -> tuple[int, ...]:
    """The num_each most chat-specific latents, and as many shared ones drawn at random of those that fire often enough.

    A latent that fires on one row of a thousand or less is hardly met in a few dialogues; where all do, any is drawn.
    """
    shared = latents[latents["verdict"] == Verdict.SHARED]
    frequent = shared[shared["frequency"] > 1e-3]
    pool = frequent if len(frequent) else shared
    drawn = pool.sample(min(num_each, len(pool)), random_state=seed)["latent"].sort_values()
    return (*most_specific_latents(latents, num_each), *(int(latent) for latent in drawn))


def is_of_chat_alone(latents: pd.DataFrame) -> bool:
    """Whether no latent has a base decoder row: the table of an SAE of the chat model or of the difference."""
    return bool((latents["decoder_norm_base"] == 0).all())


def reads_chat_alone(latents: pd.DataFrame) -> bool:
    """Whether a latent table is that of an SAE of the chat model: a difference's encoder reads the base model too."""
    return is_of_chat_alone(latents) and bool((latents["encoder_norm_base"] == 0).all())


def rank_by_nu(chosen: pd.DataFrame) -> np.ndarray:
    """Latents from most to least chat-specific: rank(nu_eps) + rank(nu_r), low is best; ties by index.

    |nu_act| where no latent has a base decoder row: the other ratios then compare x^base with an error of x^chat.
    """
    if is_of_chat_alone(chosen) and len(chosen):
        return _ordered(chosen, chosen["nu_act"].abs().to_numpy())
    return _ordered(chosen, chosen["nu_eps"].rank().to_numpy() + chosen["nu_r"].rank().to_numpy())


def rank_by_delta_norm(chosen: pd.DataFrame) -> np.ndarray:
    """Latents from highest to lowest Delta_norm; ties by index."""
    return _ordered(chosen, -chosen["delta_norm"].to_numpy())


def _ordered(chosen: pd.DataFrame, score: np.ndarray) -> np.ndarray:
    latents: np.ndarray = chosen["latent"].to_numpy()[_order(chosen, score)]
    return latents


def _order(table: pd.DataFrame, score: np.ndarray) -> np.ndarray:
    order: np.ndarray = np.lexsort((table["latent"].to_numpy(), score))
    return order


def _by_delta_norm(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(["delta_norm", "latent"], ascending=[False, True])
