"""Latents that fulfil a search: by number, by condition, by the texts on which they fire, by token; a page at a time.

Shapes: F latents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.errors import InputError, short
from pipeline.explorer.address import View
from pipeline.explorer.asked import text_of
from pipeline.explorer.conditions import search_of
from pipeline.explorer.reading import codes_of, largest_of
from pipeline.explorer.source import FLAG_COLUMNS, TEXT_COLUMNS, Explored
from pipeline.report.latent_rows import SCORE_KEY, TABLE_COLUMNS
from pipeline.report.latents import by_verdict

PAGE_ROWS = 50
ON_TEXT, ON_TOKEN = "on_text", "on_token"
"""Columns beside those of the latent table: largest f_j on the text, share of the activation that is on the token."""
SHOWN = tuple(key for key, _, _ in TABLE_COLUMNS if key not in ("latent", SCORE_KEY))
"""Numbers that the list shows, after latent and verdict."""
_SAMPLE_SECONDS = 20.0
"""How long a search by token waits for the sample to be complete."""


class FoundPage(NamedTuple):
    """One page of what was found."""

    rows: pd.DataFrame
    """latent, verdict, is_confident, SHOWN, and the columns that the search added."""
    added: tuple[str, ...]
    """Of ON_TEXT, ON_TOKEN."""
    num_found: int
    num_latents: int
    page: int
    num_pages: int
    note: str
    """What a search by token was made on."""


def find(explored: Explored, view: View) -> FoundPage:
    """The page that a view asks for. InputError for a search that cannot be understood or needs what the run lacks."""
    name = explored.crosscoder_name(view.crosscoder)
    search = search_of(view.condition, explored.column_names(name), TEXT_COLUMNS, FLAG_COLUMNS)
    base = ("latent", "verdict", "is_confident", "mean_activation", *SHOWN)
    table = explored.columns(name, tuple(dict.fromkeys([*base, *search.columns])))
    held_F = search.holds(table)
    added: dict[str, np.ndarray] = {}
    note = ""
    if view.fires.strip() or view.silent.strip():
        added[ON_TEXT], is_asked_F = _on_texts(explored, name, view)
        held_F = held_F & is_asked_F
    if view.token.strip():
        added[ON_TOKEN], note = _on_token(explored, name, view.token)
        held_F = held_F & (added[ON_TOKEN] > 0)
    found = table[held_F].assign(**{column: values_F[held_F] for column, values_F in added.items()})
    found = _sorted(found, view.sort, tuple(added))
    num_pages = max(1, -(-len(found) // PAGE_ROWS))
    page = min(max(view.page, 0), num_pages - 1)
    rows = found.iloc[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
    return FoundPage(rows, tuple(added), len(found), len(table), page, num_pages, note)


def _sorted(found: pd.DataFrame, sort: str, added: Sequence[str]) -> pd.DataFrame:
    """By the column asked for (a leading - for falling values), else by what was searched, else chat-specific first."""
    column = sort.removeprefix("-")
    if column and column not in found:
        raise InputError(f"sort: expected a column of the list, got {short(column)}")
    if column:
        return found.sort_values(column, ascending=not sort.startswith("-"), kind="stable")
    if added:
        return found.sort_values(list(added), ascending=False, kind="stable")
    mass = (found["frequency"] * found["mean_activation"]).fillna(0.0)
    return by_verdict(found.iloc[np.lexsort([-mass.to_numpy(), ~found["is_confident"].to_numpy()])])


def _on_texts(explored: Explored, name: str, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Largest f_j on the text on which latents fire, and which latents fire there and not on the other; [F] each."""
    crosscoder = explored.crosscoder(name)
    largest = []
    for typed in (view.fires, view.silent):
        f_F = np.zeros(crosscoder.num_latents)
        if typed.strip():
            with explored.models() as pair:
                f_F = largest_of(codes_of(pair, crosscoder, text_of(typed))[1])
        largest.append(f_F)
    fires_F, silent_F = largest
    is_firing_F = fires_F > 0 if view.fires.strip() else np.ones(len(fires_F), dtype=bool)
    return fires_F, is_firing_F & (silent_F == 0)


def _on_token(explored: Explored, name: str, token: str) -> tuple[np.ndarray, str]:
    """Share of every latent's activation that is on a token, [F], and what it was counted on."""
    sample = explored.sampler(name).so_far(wait_seconds=_SAMPLE_SECONDS)
    tokenizer = explored.tokenizer
    ids = np.unique(sample.token_id_B) if sample.batches else np.zeros(0, dtype=np.int64)
    wanted = {token, token.strip()}
    same = [index for index in ids.tolist() if {text := str(tokenizer.decode([index])), text.strip()} & wanted]
    if not same:
        raise InputError(
            f"token: expected a token of the sample of {sample.num_rows:,} rows, got {short(token)}, which is none; "
            "type one as the text view shows it"
        )
    share_F = sample.on_tokens(np.asarray(same))
    return share_F, f"counted on {sample.num_rows:,} validation rows"
