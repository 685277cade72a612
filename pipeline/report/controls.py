"""The controls of the verdict on the page: one chart, and the sentences that the first page takes from them.

Reads the rows of a control table (schema.CONTROL_COLUMNS); measuring them is the analyses' work. A control
that was not run is left out here and named by the page.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from pipeline.report import formatting as fmt
from pipeline.report.svg import Axis, Box, Canvas, frame, legend, text_width
from pipeline.schema import Control

ROW_HEIGHT = 20


class ControlRow(NamedTuple):
    """One control of one crosscoder."""

    control: str
    quantity: str
    value: float
    low: float
    high: float
    expected: float
    """What the value is to be held against; NaN for nothing."""
    num_latents: int
    note: str


def control_rows(controls: pd.DataFrame | None) -> list[ControlRow]:
    """The table's rows, in order; none where controls were not run."""
    if controls is None:
        return []
    return [
        ControlRow(
            control=str(row["control"]),
            quantity=str(row["quantity"]),
            value=float(row["value"]),
            low=float(row["value_low"]),
            high=float(row["value_high"]),
            expected=float(row["expected"]),
            num_latents=int(row["num_latents"]),
            note=str(row["note"]),
        )
        for row in controls.to_dict("records")
    ]


def control_sentences(rows: Sequence[ControlRow]) -> list[str]:
    """What the controls say about the count of chat-specific latents, one sentence each."""
    sentences = []
    for row in rows:
        if math.isnan(row.value):
            continue
        share, spread = fmt.percent(row.value), f"[{fmt.percent(row.low)}, {fmt.percent(row.high)}]"
        if row.control == Control.STATED:
            number = fmt.decimal(row.value * row.num_latents, 1)
            sentences.append(
                f"At most {number} of the {fmt.count(row.num_latents)} are expected to be false ({share}, "
                "Benjamini-Hochberg)."
            )
        elif row.control == Control.RANDOM:
            passed = f"{fmt.count(round(row.value * row.num_latents))} of {fmt.count(row.num_latents)}"
            sentences.append(
                f"With other latents' directions in place of their own, {passed} would have passed ({share} {spread})."
            )
        elif row.control in (Control.NULL_PAIR, Control.NOISE_PAIR):
            sentences.append(f"This is a {row.control}: every chat-specific latent is false, {share} {spread} of all.")
        elif row.control.startswith(Control.SEED):
            other = row.control.removeprefix(Control.SEED).strip()
            sentences.append(f"Training again with another seed ({other}) finds the same set to {share} {spread}.")
    return sentences


def controls_chart(groups: Sequence[tuple[str, str, Sequence[ControlRow]]]) -> str:
    """Every control as a dot with its interval, by crosscoder (name, colour, rows); a tick where expected."""
    drawn = [(name, colour, [row for row in rows if math.isfinite(row.value)]) for name, colour, rows in groups]
    drawn = [group for group in drawn if group[2]]
    left = min(210.0, 28 + max((text_width(row.control) for _, _, rows in drawn for row in rows), default=80))
    bottom = 40 + sum(len(rows) * ROW_HEIGHT + 12 for _, _, rows in drawn)
    canvas = Canvas(460, bottom + 46)
    box = Box(left, 34, 440, bottom).lower(legend(canvas, [(name, colour) for name, colour, _ in drawn]))
    axis = Axis("share, %", 0, 1, ticks=(0, 0.25, 0.5, 0.75, 1), tick_text=lambda value: f"{100 * value:g}")
    plot = frame(canvas, box, axis, Axis("", 0, 1, ticks=()))
    y = box.top + 4.0
    for name, colour, rows in drawn:
        for row in rows:
            middle = y + ROW_HEIGHT / 2
            canvas.text(left - 10, middle + 4, row.control, "var(--text)", text_anchor="end")
            canvas.line(box.left, middle, box.right, middle)
            if math.isfinite(row.expected):
                at = plot.x(row.expected)
                canvas.line(at, middle - 7, at, middle + 7, "var(--muted)", stroke_width=2)
            if math.isfinite(row.low) and math.isfinite(row.high):
                canvas.line(plot.x(row.low), middle, plot.x(row.high), middle, colour, stroke_width=2)
            title = f"{name}, {row.control}: {row.quantity}, {fmt.percent(row.value)}"
            canvas.add("circle", title, cx=plot.x(row.value), cy=middle, r=4, fill=colour)
            y += ROW_HEIGHT
        y += 12
    return canvas.render("Controls of the verdict", "dot: measured with 95% interval; tick: what it is held against")
