"""Which figures a run has, with their titles and notes: from a ReportData to named Vega-Lite specifications.

An analysis that was off yields no figure. Notes say what the drawing alone does not: how many points lie outside a
frame, where an axis does not start at 0, which numbers a curve ends at.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from pipeline.analyses.planted_columns import Scoring
from pipeline.report import formatting as fmt
from pipeline.report.charts import causality, comparison, ownership, places, scaling, scores, steering, training
from pipeline.report.charts.style import Chart, spec_of
from pipeline.report.data import ReportData
from pipeline.report.summary import (
    CANDIDATE_SPECIFIC,
    EVIDENCE_ORDER,
    anchor,
    chat_only_rows,
    corpora_of,
    verdict_summary,
)
from pipeline.schema import Ownership, Verdict

CURVES = (
    ("loss", "Training loss", {"loss": ""}, "loss per row"),
    ("fve", "Variance explained", {"fve_chat": "chat", "fve_base": "base"}, "FVE, share of variance"),
    ("l0", "Sparsity", {"l0": ""}, "L0, active latents per row"),
    ("dead_frac", "Dead latents", {"dead_frac": ""}, "share of all latents"),
)
"""Name, title, columns with the model that each is about, and axis title of each figure of training curves."""

BELOW = {
    "nu_eps": "Chat-only latents below a threshold of nu_eps",
    "nu_r": "Chat-only latents below a threshold of nu_r",
    "nu_act": "Live latents below a threshold of nu_act",
}
"""Ratios whose counts are drawn for every dictionary of the run; nu_act is the one that all of them have."""

POSITIONS = {"all": "all positions that predict assistant tokens", "first_9": "first nine tokens of each answer"}


class Figure(NamedTuple):
    """One figure of the page."""

    name: str
    """File name without ending and HTML id: letters, digits, - and _; unique in a report."""
    section: str
    """The page's section that shows it."""
    title: str
    note: str
    """What a reader needs besides the drawing; may be empty."""
    spec: dict[str, Any]
    """Vega-Lite, without configuration."""


def all_figures(data: ReportData) -> list[Figure]:
    """Every figure that the data allow, in the page's order."""
    names = [fmt.visible(one.name) for one in data.crosscoders]
    found: list[Figure] = []
    for topic in (
        _planted,
        _explanations,
        _comparison,
        _training,
        _ownership,
        _scaling,
        _counts_below,
        _controls,
        _places,
        _interventions,
        _kl_curves,
        _steering,
    ):
        found += topic(data, names)
    taken: dict[str, int] = {}
    for index, figure in enumerate(found):
        # Two names may differ only in letters that a file name cannot hold.
        taken[figure.name] = taken.get(figure.name, 0) + 1
        if taken[figure.name] > 1:
            found[index] = figure._replace(name=f"{figure.name}_{taken[figure.name]}")
    return found


def slug(name: str) -> str:
    """Letters, digits, - and _ of a name, so that it can be a file name or an HTML id."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "-" for letter in name)


def _figure(name: str, section: str, title: str, chart: Chart, *notes: str) -> Figure:
    note = " ".join(part for part in notes if part)
    return Figure(name, section, title, note, spec_of(chart, f"{title}. {note}".strip()))


def _stacked(data: ReportData, field: str) -> pd.DataFrame:
    """One table of all crosscoders with `crosscoder` and, if it has latents, `card`; empty if it was off."""
    frames = []
    for place, one in enumerate(data.crosscoders):
        table: pd.DataFrame | None = getattr(one, field)
        if table is None or table.empty:
            continue
        table = table.assign(crosscoder=fmt.visible(one.name))
        if "latent" in table:
            table["card"] = _cards(place, table)
        frames.append(table)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _cards(place: int, table: pd.DataFrame) -> "pd.Series[str]":
    """Anchor of each row's latent; None for a row that is about no latent."""
    cards = [anchor(place, int(latent)) if latent >= 0 else None for latent in table["latent"]]
    return pd.Series(cards, index=table.index, dtype=object)


def _planted(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "planted")
    table = table if table.empty else table[table["scoring"] == Scoring.TURN].reset_index(drop=True)
    if table.empty or table["auroc"].isna().all():
        return
    table["behavior"] = [fmt.visible(fmt.words(name)) for name in table["behavior"]]
    lacking = table[(table["candidate"] == CANDIDATE_SPECIFIC) & table["auroc"].isna()]
    pairs = [f"{row.behavior} ({row.crosscoder})" for row in lacking.itertuples()]
    note = f"No chat-specific latent for {', '.join(pairs)}." if pairs else ""
    yield _figure("planted", "planted", "AUROC of answers", scores.planted_chart(table, names), note)


def _explanations(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "autointerp")
    if table.empty or table["balanced_accuracy"].isna().all():
        return
    table = table[table["balanced_accuracy"].notna()]
    table = table.assign(explanation=[fmt.visible(str(text)) for text in table["explanation"]])
    columns = ["balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high"]
    table = table[["crosscoder", "latent", "card", "explanation", *columns]]
    chart = scores.explanation_chart(table, names)
    yield _figure("explanations", "explanations", "How well each explanation holds", chart, "Dashed: chance.")


def _comparison(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    """Of two crosscoders or more."""
    rows = [
        {
            "crosscoder": name,
            **{key: one.fidelity[key] for key in ("fve", "l0")},
            "specific": "not measured" if one.latents is None else fmt.count(verdict_summary(one.latents).num_specific),
        }
        for name, one in zip(names, data.crosscoders, strict=True)
        if one.fidelity is not None
    ]
    if len(rows) > 1:
        chart = comparison.fidelity_chart(pd.DataFrame(rows), names)
        yield _figure("fve_l0", "fidelity", "Variance explained by active latents", chart, "On validation rows.")


def _training(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "curves")
    for name, title, columns, label in CURVES if len(table) else ():
        parts = [
            training.thinned(rows[["crosscoder", "step", column]].rename(columns={column: "value"})).assign(model=model)
            for column, model in columns.items()
            for _, rows in table.groupby("crosscoder", sort=False)
        ]
        curves = pd.concat(parts, ignore_index=True)
        if curves.empty:
            continue
        ends = [
            f"{crosscoder}{f' ({model})' if model else ''} {fmt.significant(float(rows['value'].iloc[-1]))}"
            for (crosscoder, model), rows in curves.groupby(["crosscoder", "model"], sort=False)
        ]
        hidden = training.num_outside(curves)
        outside = f"Early steps outside the frame: {fmt.plural(hidden, 'point')}." if hidden else ""
        chart = training.curve_chart(curves, label, names)
        yield _figure(f"training_{name}", "fidelity", title, chart, f"At the end: {', '.join(ends)}.", outside)


def _ownership(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "latents")
    if table.empty:
        return
    alive = table[(table["verdict"] != Verdict.DEAD) & table["delta_norm"].notna()]
    if len(alive):
        chart = ownership.delta_norm_chart(alive[["crosscoder", "delta_norm"]], names)
        yield _figure("delta_norm", "ownership", "Who owns the latents", chart)


def _scaling(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "latents")
    for name, one in zip(names, data.crosscoders, strict=True):
        if table.empty or one.latents is None:
            continue
        rows = chat_only_rows(table[table["crosscoder"] == name])
        drawn = rows[rows["nu_eps"].notna() & rows["nu_r"].notna()]
        if drawn.empty:
            continue
        thresholds = one.nu_eps_threshold, one.nu_r_threshold
        title = f"{name}, {fmt.count(len(drawn))} of {fmt.plural(len(rows), 'chat-only latent')}"
        outside = scaling.num_outside(drawn, *thresholds)
        notes = [f"{fmt.plural(outside, 'latent')} outside the frame." if outside else ""]
        if len(drawn) > scaling.MAX_DOTS:
            notes.append(f"Of the {fmt.count(len(drawn))} latents about {fmt.count(scaling.MAX_DOTS)} are drawn.")
        yield _figure(f"nu_{slug(one.name)}", "scaling", title, scaling.nu_chart(drawn, *thresholds), *notes)


def _counts_below(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "latents")
    for ratio, title in BELOW.items() if len(table) else ():
        rows = table[table["verdict"] != Verdict.DEAD]
        if ratio != "nu_act":  # a latent that was made without a base row has no such ratios
            rows = rows[(rows["ownership"] == Ownership.CHAT_ONLY) & (rows["decoder_norm_base"] > 0)]
        counts = scaling.counts_below(rows, ratio)
        if len(counts):
            yield _figure(f"below_{ratio}", "scaling", title, scaling.below_chart(counts, ratio, names))


def _controls(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "controls")
    if len(table) and table["value"].notna().any():
        for column in ("control", "quantity", "note"):
            table[column] = [fmt.visible(str(text)) for text in table[column]]
        yield _figure("controls", "controls", "Controls of the verdict", scores.control_chart(table, names))


def _places(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "latents")
    if table.empty:
        return
    shares = places.speaker_shares(table)
    if len(shares):
        yield _figure("speakers", "places", "Activation by speaker", places.speaker_chart(shares))
    spreads = places.frequency_spreads(table, corpora_of(table))
    if len(spreads):
        note = "Line: 5 to 95% of the latents. Box: 25 to 75%. Tick: median."
        yield _figure("corpora", "places", "Frequency by corpus", places.frequency_chart(spreads, names), note)


def _interventions(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "causality")
    for positions, where in POSITIONS.items() if len(table) else ():
        own = table[table["positions"] == positions]
        whole, halves = (causality.intervention_rows(own, halves=halves) for halves in (False, True))
        if len(whole):
            chart = causality.kl_chart(whole, names)
            yield _figure(f"kl_{positions}", "causality", f"KL per intervention, {where}", chart)
        if len(halves):
            none = own.loc[own["intervention"] == "none", "kl"]
            baseline = float(none.iloc[0]) if len(none) else float(halves["kl"].max())
            chart = causality.kl_chart(halves, names, baseline=baseline)
            note = "The axis does not start at 0. Dashed: no edit. Open the paired differences to tell halves apart."
            yield _figure(f"kl_halves_{positions}", "causality", f"Halves of the latents, {where}", chart, note)


def _kl_curves(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "causality_curve")
    for positions, where in POSITIONS.items() if len(table) else ():
        curve = table[table["positions"] == positions]
        curve = curve.assign(is_evidence=curve["order"] == EVIDENCE_ORDER)
        if curve["is_evidence"].sum() > 1:
            chart = causality.kl_curve_chart(curve, names)
            note = "Solid: most chat-specific first. Dashed: random order. The axis does not start at 0."
            yield _figure(f"kl_curve_{positions}", "causality", f"KL by latents added, {where}", chart, note)


def _steering(data: ReportData, names: Sequence[str]) -> Iterator[Figure]:
    table = _stacked(data, "steering")
    for behavior, rows in table.groupby("behavior", sort=False) if len(table) else ():
        parts = []
        for place, name in enumerate(names):
            own = rows[rows["crosscoder"] == name]
            if len(own):
                lines = steering.sweep_lines(own)
                parts.append(lines.assign(crosscoder=name, card=_cards(place, lines)))
        lines = pd.concat(parts, ignore_index=True)
        if (lines["line"] != steering.UNSTEERED).any():
            chart = steering.steering_chart(lines, names)
            title = fmt.visible(fmt.words(str(behavior)))
            yield _figure(f"steering_{slug(str(behavior))}", "steering", title, chart)
