"""The rows of the latent table, as JSON embedded in the page.

The table carries every latent except the shared and dead ones (tens of thousands in a real crosscoder, and not what a
reader looks for), at most MAX_TABLE_ROWS of them; the page's script sorts, filters and draws a few at a time.
Everything is data here: `script_json` escapes what could end a script element.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.latents import CardSources, LatentCard, by_verdict, number_of
from pipeline.report.palette import VERDICT_ROLES
from pipeline.report.summary import planted_rows, steering_effects
from pipeline.schema import Verdict

MAX_TABLE_ROWS = 20_000

SCORE_KEY = "explained"
"""Column of the explanations' scores: from the autointerp table, not from the latent table."""

TABLE_COLUMNS = (
    ("latent", "latent", "index of the latent; press to open its card"),
    ("delta_norm", "Delta_norm", "relative decoder norm; 1 = chat-only, 0 = base-only"),
    ("nu_eps", "nu_eps", "high: shrunk away in the base model"),
    ("nu_r", "nu_r", "high: other latents carry it in the base model"),
    ("artifact_probability", "artifact", "bootstrap probability that a deciding ratio is beyond its threshold"),
    ("decoder_cosine", "cosine", "cosine of the two decoder directions"),
    ("frequency", "fires on", "share of validation rows"),
    ("max_activation", "max f", "largest activation"),
    ("template_frac", "template", "share of its activation on template tokens"),
    ("user_frac", "user", "share of its activation on user tokens"),
    ("assistant_frac", "assistant", "share of its activation on assistant tokens"),
    (SCORE_KEY, "explained", "balanced accuracy of its explanation on held-out contexts"),
)
"""Column of the latent table, heading, and what it means. nu columns carry their interval as a tooltip."""


class LatentTable(NamedTuple):
    """What the page's table works on."""

    json: str
    """Safe inside a script element."""
    num_rows: int
    num_left_out: int
    """Shared, dead or beyond MAX_TABLE_ROWS."""


def latent_table(data: ReportData, cards: Sequence[tuple[CardSources, Sequence[LatentCard]]]) -> LatentTable:
    """The embedded rows of all crosscoders: chat-specific first, then by the order of schema.Verdict.

    `cards` are the sources and all cards of each crosscoder.
    """
    total = sum(len(one.latents) for one in data.crosscoders if one.latents is not None)
    rows: list[_TableRow] = []
    for crosscoder, (sources, own) in zip(data.crosscoders, cards, strict=True):
        rows += _table_rows(crosscoder, sources, own)
    rows = sorted(rows, key=lambda row: row.verdict)[:MAX_TABLE_ROWS]
    content = {
        "crosscoders": [crosscoder.name for crosscoder in data.crosscoders],
        "verdicts": [{"name": verdict, "role": VERDICT_ROLES[verdict]} for verdict in Verdict.ALL],
        "columns": [{"key": key, "label": label, "title": title} for key, label, title in TABLE_COLUMNS],
        "rows": [[*row[:-1], *row.values] for row in rows],
    }
    return LatentTable(script_json(content), len(rows), total - len(rows))


class _TableRow(NamedTuple):
    """One row as the page's script reads it; the values follow the other fields."""

    crosscoder: int
    verdict: int
    """Index into schema.Verdict.ALL."""
    is_confident: int
    card: str
    """Anchor of its card, visible or waiting in a template element; empty where it has none."""
    behaviors: list[str]
    intervals: list[float | None]
    """nu_eps low, high, nu_r low, high."""
    explanation: str
    values: list[float | None]
    """In the order of TABLE_COLUMNS, four digits, None for NaN."""


def _table_rows(crosscoder: CrosscoderReport, sources: CardSources, own: Sequence[LatentCard]) -> list[_TableRow]:
    if crosscoder.latents is None:
        return []
    named = _named_behaviors(crosscoder)
    table = crosscoder.latents
    explained = sources.explanations
    cards = {card.latent: card.anchor for card in own}
    kept = table[~table["verdict"].isin([Verdict.SHARED, Verdict.DEAD]) | table["latent"].isin([*named, *cards])]
    kept = by_verdict(kept).head(MAX_TABLE_ROWS)
    intervals = [f"{name}_{end}" for name in ("nu_eps", "nu_r") for end in ("low", "high")]
    kept = kept.assign(
        **{
            SCORE_KEY: [
                explained[int(j)].balanced_accuracy if int(j) in explained else math.nan for j in kept["latent"]
            ]
        }
    )
    values = [key for key, _, _ in TABLE_COLUMNS]
    return [
        _TableRow(
            crosscoder=sources.place,
            verdict=Verdict.ALL.index(str(row["verdict"])),
            is_confident=int(bool(row["is_confident"])),
            card=cards.get(int(row["latent"]), ""),
            behaviors=named.get(int(row["latent"]), []),
            intervals=[_short(row[name]) for name in intervals],
            explanation=explained[int(row["latent"])].text if int(row["latent"]) in explained else "",
            values=[_short(row[name]) for name in values],
        )
        for row in kept[["verdict", "is_confident", *intervals, *values]].to_dict("records")
    ]


def _named_behaviors(crosscoder: CrosscoderReport) -> dict[int, list[str]]:
    """Latent -> behaviours that it finds best (of its kind) or was steered for."""
    planted = planted_rows(crosscoder.planted)
    scores = [(row.behavior, one.latent) for row in planted for one in (row.specific, row.any_latent)]
    effects = [(effect.behavior, effect.latent) for effect in steering_effects(crosscoder.steering)]
    named: dict[int, list[str]] = {}
    for behavior, latent in (*scores, *effects):
        known = named.setdefault(latent, [])
        if fmt.words(behavior) not in known:
            known.append(fmt.words(behavior))
    return named


def _short(value: object) -> float | None:
    number = number_of(value)
    if not math.isfinite(number):
        return None
    return int(number) if number == int(number) else float(f"{number:.4g}")


def script_json(content: object) -> str:
    """JSON that cannot end its script element or start a comment: ASCII, with <, > and & as escapes."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
