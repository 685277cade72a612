"""The search language of the report's latent table, over every column: numbers, conditions and words, all to hold.

`nu_r<0.3 and frequency>0.1%` are conditions; a number is a latent; other words must occur in a latent's texts. A column
may be named by its beginning or by the report's heading. `verdict="stronger in chat"` compares texts.
"""

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pipeline.errors import InputError, short
from pipeline.report.latent_rows import TABLE_COLUMNS

_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_PART = re.compile(
    r"""(?P<name>[A-Za-z_][\w ]*?)\s*(?P<compare><=|>=|!=|==|=|<|>)\s*(?P<value>"[^"]*"|'[^']*'|[^\s,]+)"""
    r"""|(?P<word>[^\s,]+)"""
)
_JOINING = ("and", "&", "&&")
WORD_COLUMNS = ("verdict", "control_token", "reason")
"""Columns in which words are looked for."""


class Condition(NamedTuple):
    """One comparison of a column."""

    column: str
    compare: str
    value: float | str | bool

    def holds(self, column_F: np.ndarray) -> np.ndarray:
        """bool [F]; a missing number fulfils nothing."""
        if isinstance(self.value, float):
            numbers_F = column_F.astype(np.float64)
            held_F: np.ndarray = _COMPARED[self.compare](numbers_F, self.value) & ~np.isnan(numbers_F)
            return held_F
        return np.asarray(_COMPARED[self.compare](column_F, self.value), dtype=bool)


class Search(NamedTuple):
    """What latents must fulfil."""

    conditions: tuple[Condition, ...] = ()
    words: tuple[str, ...] = ()
    """In lower case."""
    latents: tuple[int, ...] = ()
    """Any of these; empty for all."""

    @property
    def columns(self) -> list[str]:
        """Columns of the latent table that it reads."""
        return list(dict.fromkeys([*(one.column for one in self.conditions), *(WORD_COLUMNS if self.words else ())]))

    def holds(self, table: pd.DataFrame) -> np.ndarray:
        """bool [F]: which rows of a latent table fulfil everything."""
        held_F = np.ones(len(table), dtype=bool)
        for one in self.conditions:
            held_F &= one.holds(table[one.column].to_numpy())
        if self.latents:
            held_F &= np.isin(np.arange(len(table)), self.latents)
        for word in self.words:
            texts = (table[name].fillna("").str.lower().str.contains(word, regex=False) for name in WORD_COLUMNS)
            held_F &= np.logical_or.reduce([own.to_numpy(dtype=bool) for own in texts])
        return held_F


def search_of(typed: str, columns: Sequence[str], texts: Sequence[str], flags: Sequence[str] = ()) -> Search:
    """The search that was typed; columns are those of the latent table, texts and flags those without numbers.

    InputError for a column that the table lacks, and for a value of another kind.
    """
    conditions, words, latents = [], [], []
    for found in _PART.finditer(typed):
        if found["word"] is None:
            conditions.append(_condition(found, columns, texts, flags))
        elif found["word"].isascii() and found["word"].isdigit():
            latents.append(int(found["word"]))
        elif found["word"].lower() not in _JOINING:
            words.append(found["word"].lower())
    return Search(tuple(conditions), tuple(words), tuple(latents))


def _condition(found: re.Match[str], columns: Sequence[str], texts: Sequence[str], flags: Sequence[str]) -> Condition:
    # "and" before a name is no part of it.
    name = re.sub(r"^(?:(?:and|&&?)\s+)+", "", found["name"].strip(), flags=re.IGNORECASE)
    column, compare = _column(name, columns), found["compare"].replace("==", "=")
    value = found["value"].strip("\"'")
    if column in flags:
        if value.lower() not in ("true", "false", "yes", "no", "1", "0") or compare not in ("=", "!="):
            raise InputError(f"{column}: expected = or != with true or false, got {compare}{short(value)}")
        return Condition(column, compare, value.lower() in ("true", "yes", "1"))
    if column in texts:
        if compare not in ("=", "!="):
            raise InputError(f"{column}: expected = or != with a text, got {compare}")
        return Condition(column, compare, value)
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError as error:
        raise InputError(f"{column}: expected a number, or one with %, to compare with, got {short(value)}") from error
    return Condition(column, compare, number)


def _column(name: str, columns: Sequence[str]) -> str:
    """The column of this name, or that it begins, or whose heading it begins, in the report's order first."""
    wanted = name.lower()
    headings = {heading.lower(): key for key, heading, _ in TABLE_COLUMNS if key in columns}
    named = [*(key for key in headings.values()), *columns]
    for candidates in (
        [key for key in columns if key.lower() == wanted],
        [key for heading, key in headings.items() if heading == wanted],
        [key for key in named if key.lower().startswith(wanted)],
        [key for heading, key in headings.items() if heading.startswith(wanted)],
    ):
        if candidates:
            return candidates[0]
    near = difflib.get_close_matches(wanted, columns, n=3, cutoff=0.4) or list(columns[:5])
    raise InputError(f"condition: expected a column of the latent table, got {short(name)}; near it: {', '.join(near)}")
