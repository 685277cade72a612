"""Colours of the report by role, each as a light and a dark value, and the look of its figures.

Figures name roles (`var(--series-1)`). The page maps a role to a colour by the reader's theme; a figure that leaves the
page as a file gets the light values written in. Series colours tell crosscoders apart; verdict colours mean the same in
every figure, table and card. Pairs differ in lightness as well as in hue.
"""

import re
from collections.abc import Sequence
from typing import Any

from pipeline.schema import Verdict

COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#ffffff", "#15171b"),
    "panel": ("#f6f7f8", "#1c1f25"),
    "line": ("#dfe2e6", "#333942"),
    "grid": ("#e9ebee", "#2a2f37"),
    "band": ("#f1f3f5", "#22262d"),
    "text": ("#1b1f24", "#e7e9ec"),
    "muted": ("#59616c", "#a3abb6"),
    "link": ("#1d5bbf", "#8fb8fb"),
    "heat": ("#ffb52e", "#8d5500"),
    "series-1": ("#2f62c0", "#82abf7"),
    "series-2": ("#b03a7d", "#ef8fc2"),
    "series-3": ("#66760f", "#bccb62"),
    "series-4": ("#0f7f95", "#62c8dc"),
    "series-5": ("#7d5a36", "#d0ab84"),
    "series-6": ("#7346b3", "#bd9bf0"),
    "specific": ("#0f7d59", "#4ec598"),
    "specific-soft": ("#8fd0b8", "#28684f"),
    "accept": ("#e8f5ef", "#1a2a25"),
    "shrinkage": ("#dd9a12", "#e7b04d"),
    "decoupling": ("#c8562c", "#ea8a63"),
    "both": ("#87392a", "#b9614f"),
    "undecided": ("#b4bac3", "#646c78"),
    "base-only": ("#6a5fb0", "#a99ff0"),
    "plain": ("#8b929c", "#818995"),
    "place-template": ("#b9891f", "#d9b45c"),
    "place-user": ("#5f86c9", "#8fb0ea"),
    "place-assistant": ("#2f8f73", "#62c2a4"),
    "place-else": ("#c9ced6", "#4a525d"),
}
"""Role -> (light, dark)."""

NUM_SERIES = 6

VERDICT_ROLES = {
    Verdict.CHAT_SPECIFIC: "specific",
    Verdict.STRONGER: "plain",
    Verdict.ROTATED: "plain",
    Verdict.SHRINKAGE: "shrinkage",
    Verdict.DECOUPLING: "decoupling",
    Verdict.BOTH: "both",
    Verdict.UNDECIDED: "undecided",
    Verdict.WITHHELD: "undecided",
    Verdict.BASE_ONLY: "base-only",
    Verdict.SHARED: "plain",
    Verdict.OTHER: "plain",
    Verdict.DEAD: "undecided",
}
"""Verdict -> role of its colour."""


def css_variables() -> str:
    """CSS declarations of all roles; `light-dark()` follows the element's color-scheme."""
    return "".join(f"--{role}:light-dark({light},{dark});" for role, (light, dark) in COLOURS.items())


def with_light_colours(text: str) -> str:
    """The text with every var(--role) replaced by its light value, so that any viewer can draw it."""
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda match: COLOURS.get(match[1], (match[0], ""))[0], text)


def series_colour(index: int) -> str:
    """Colour of the index-th crosscoder; colours repeat after NUM_SERIES."""
    return f"var(--series-{index % NUM_SERIES + 1})"


def series_colours(names: Sequence[str]) -> dict[str, str]:
    """Crosscoder name -> colour, by order of appearance."""
    return {name: series_colour(index) for index, name in enumerate(names)}


FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
LABEL_LIMIT = 180
"""Widest label of a row or legend, in pixels; longer ones lose their end, the tooltip holds them whole."""

THEME: dict[str, Any] = {
    "font": FONT,
    "background": "transparent",
    "padding": 4,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "labelFontSize": 11.5,
        "labelLimit": LABEL_LIMIT,
        "labelSeparation": 6,
        "titleColor": "var(--text)",
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "var(--grid)",
        "domainColor": "var(--muted)",
        "tickColor": "var(--muted)",
    },
    "axisX": {"titlePadding": 8, "titleAnchor": "end"},
    "axisQuantitative": {"tickCount": 5},
    # The title of a y axis stands above it and reads from left to right.
    "axisY": {
        "domain": False,
        "ticks": False,
        "titleAngle": 0,
        "titleAlign": "left",
        "titleAnchor": "end",
        "titleX": -36,
        "titleY": -12,
        "minExtent": 36,
    },
    "legend": {
        "orient": "top",
        "title": None,
        "columns": 3,
        "labelColor": "var(--text)",
        "labelFontSize": 12,
        "labelLimit": LABEL_LIMIT,
        "symbolSize": 80,
        "symbolStrokeWidth": 2,
        "symbolOpacity": 1,
        "rowPadding": 5,
        "offset": 30,
    },
    "text": {"color": "var(--muted)", "fontSize": 11.5},
    "rule": {"color": "var(--muted)"},
}
"""Vega-Lite configuration of every figure."""
