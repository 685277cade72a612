"""Which layer to look at, from the curve over layers, in words; and the curve as text.

The layer recommended is the earliest at which enough of the difference in behaviour is present: earlier, a dictionary
cannot see it, later, it sees its consequences. The last two layers, where the stream is turned into next tokens, are
taken only where no other layer carries enough. Nothing is recommended that was not measured, and nothing at all where
the models cannot be told apart. Reads a table, runs no model.
"""

from typing import Any, NamedTuple

import pandas as pd

from pipeline.analyses.next_tokens import ALL, ASSISTANT

DEFAULT_MIN_SHARE = 0.5
NUM_LAST = 2
"""Layers at the end that are a last resort."""
_LEAST_SHARE = 0.05
"""Where no layer carries even this much, none is named: the difference lies in the final norm or the head."""


class LayerChoice(NamedTuple):
    """The layer to look at, or why there is none."""

    layer: int | None
    """From 0; None where the table gives no ground for any layer."""
    reason: str
    """One or two sentences with the numbers."""


def recommend(table: pd.DataFrame, *, min_share: float = DEFAULT_MIN_SHARE, tokens: str | None = None) -> LayerChoice:
    """The earliest measured layer with a share of at least min_share (layer_curve.LAYER_COLUMNS).

    tokens: which rows of the table decide; None takes the assistant's tokens where there are any, else all.
    """
    first = table.iloc[0]
    if not first["is_distinguishable"]:
        return LayerChoice(None, f"No layer is recommended. {first['reason']}")
    curve = _curve(table, tokens)
    enough = curve[curve["share"] >= min_share]
    inner = enough[enough["num_layers_above"] >= NUM_LAST]
    if len(inner):
        return LayerChoice(int(inner.iloc[0]["layer"]), _reason(inner.iloc[0], curve, min_share))
    if len(enough):
        only = f" Only the last {NUM_LAST} of the model's layers carry {min_share:.0%}."
        return LayerChoice(int(enough.iloc[0]["layer"]), _reason(enough.iloc[0], curve, min_share) + only)
    best = curve.iloc[int(curve["share"].to_numpy().argmax())]
    if best["share"] < _LEAST_SHARE:
        return LayerChoice(
            None,
            f"No layer is recommended: {_carries(best)}, and no measured layer carries more, so the difference of "
            f"{best['kl_total']:.3g} nats per token arises above the residual stream, in the final norm or the head.",
        )
    return LayerChoice(
        int(best["layer"]), f"{_capital(_carries(best))}, the most of {_measured(curve)}; none carries {min_share:.0%}."
    )


def _curve(table: pd.DataFrame, tokens: str | None) -> pd.DataFrame:
    """The rows that decide, layers ascending."""
    wanted = tokens or (ASSISTANT if (table["tokens"] == ASSISTANT).any() else ALL)
    return table[table["tokens"] == wanted].sort_values("layer")


def _carries(row: "pd.Series[Any]") -> str:
    return (
        f"layer {int(row['layer'])} carries {row['share']:.0%} [{row['share_low']:.0%}, {row['share_high']:.0%}] of "
        "the difference in behaviour"
    )


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _measured(curve: pd.DataFrame) -> str:
    last = curve.iloc[-1]
    num_layers = int(last["layer"]) + int(last["num_layers_above"]) + 1
    return f"{len(curve)} measured layers of {num_layers}"


def _reason(row: "pd.Series[Any]", curve: pd.DataFrame, min_share: float) -> str:
    below = curve[curve["layer"] < row["layer"]]
    before = f", layer {int(below.iloc[-1]['layer'])} below it {below.iloc[-1]['share']:.0%}" if len(below) else ""
    tokens = "the assistant's tokens" if row["tokens"] == ASSISTANT else "all tokens"
    return (
        f"{_capital(_carries(row))}: with base's stream put in there, the chat model's next tokens move by "
        f"{row['kl']:.3g} nats per token, of {row['kl_total']:.3g} between the models ({tokens}). It is the first of "
        f"{_measured(curve)} with at least {min_share:.0%}{before}."
    )


def text_table(table: pd.DataFrame, *, tokens: str | None = None) -> str:
    """The curve as lines of text: layer, share and KL with intervals, relative difference of the streams."""
    lines = [f"{'layer':>5}  {'share of difference':>22}  {'KL, nats per token':>30}  {'stream difference':>22}"]
    for _, row in _curve(table, tokens).iterrows():
        share = "-"  # the models cannot be told apart: there is nothing to share out
        if row["is_distinguishable"]:
            share = f"{row['share']:.0%} [{row['share_low']:.0%}, {row['share_high']:.0%}]"
        kl, difference = (
            f"{row[name]:.3g} [{row[f'{name}_low']:.3g}, {row[f'{name}_high']:.3g}]" for name in ("kl", "difference")
        )
        lines.append(f"{int(row['layer']):>5}  {share:>22}  {kl:>30}  {difference:>22}")
    return "\n".join(lines)
