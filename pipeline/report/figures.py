"""All figures of a report, chosen and captioned: SVG for the page, and as files for the tracker.

`figure_list` decides which figures the data allow, in the page's order; `figures` returns the same ones as SVG files
with light colours and a background. An analysis that was off simply yields no figure.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from pipeline.report import charts, controls, effects, places, ranked, steering
from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.palette import series_colours, with_light_colours
from pipeline.report.summary import (
    EVIDENCE_ORDER,
    PlantedScore,
    chat_only_rows,
    planted_rows,
)
from pipeline.schema import Verdict

CURVE_FIGURES = (
    ("loss", "Training loss", ("loss",), "loss per row", None, None),
    ("fve", "Variance explained", ("fve_base", "fve_chat"), "FVE (solid: chat, dashed: base)", 0.0, 1.0),
    ("l0", "Sparsity", ("l0",), "L0, active latents per row", 0.0, None),
    ("dead_frac", "Dead latents", ("dead_frac",), "share of all latents", 0.0, 1.0),
)
"""Name, title, columns, axis label, floor and ceiling of each figure of training curves."""

POSITIONS = (("all", "All positions that predict assistant tokens"), ("first_9", "First nine tokens of each answer"))

SHARED_INTERVENTIONS = ("none", "template", "mean_difference", "mean_difference_projection")
"""Interventions that use no crosscoder: drawn once."""
SANITY_INTERVENTIONS = ("base", "chat")
"""Only in the table: base equals none, and chat must be exactly 0."""

KL_LAYOUT: tuple[tuple[str, str], ...] = (
    ("none", "none"),
    ("template", "template"),
    ("mean difference", "mean_difference"),
    ("mean difference, projected", "mean_difference_projection"),
    ("all latents", "all"),
    ("error", "error"),
    ("half of the latents measured, replaced", ""),
    ("best half", "best_half_replace"),
    ("random halves", r"random_half_\d+_replace"),
    ("worst half", "worst_half_replace"),
    ("best by Delta_norm", "best_half_replace_by_delta_norm"),
    ("worst by Delta_norm", "worst_half_replace_by_delta_norm"),
    ("half of the latents measured, added", ""),
    ("best half", "best_half_add"),
    ("random halves", r"random_half_\d+_add"),
    ("worst half", "worst_half_add"),
    ("best by Delta_norm", "best_half_add_by_delta_norm"),
    ("worst by Delta_norm", "worst_half_add_by_delta_norm"),
)
"""Label and pattern of each group of bars, in order; an empty pattern is a heading. Other interventions follow."""


class Figure(NamedTuple):
    """One figure of the page."""

    name: str
    """File name without ending: letters, digits, - and _."""
    section: str
    """The page's section that shows it."""
    title: str
    svg: str


def figure_list(data: ReportData) -> list[Figure]:
    """Every figure that the data allow, in the page's order."""
    colours = series_colours([crosscoder.name for crosscoder in data.crosscoders])
    return [
        *_planted_figures(data, colours),
        *_explanation_figures(data, colours),
        *_training_figures(data, colours),
        *_ownership_figures(data, colours),
        *_scaling_figures(data),
        *_control_figures(data, colours),
        *_place_figures(data, colours),
        *_causality_figures(data, colours),
        *_steering_figures(data, colours),
    ]


def figures(data: ReportData) -> dict[str, bytes]:
    """File name -> SVG file in light colours on white, for artifact stores."""
    files: dict[str, bytes] = {}
    for figure in figure_list(data):
        # Two names may differ only in letters that a file name cannot hold.
        same = sum(re.fullmatch(rf"{figure.name}(_\d+)?\.svg", name) is not None for name in files)
        name = f"{figure.name}_{same + 1}" if same else figure.name
        files[f"{name}.svg"] = standalone(figure.svg).encode()
    return files


def standalone(svg: str) -> str:
    """The figure as a file of its own: light colours written in, white behind it."""
    head, _, body = svg.partition(">")
    return with_light_colours(f'{head}><rect width="100%" height="100%" fill="var(--page)"/>{body}')


def slug(name: str) -> str:
    """Letters, digits, - and _ of a name, so that it can be a file name or an HTML id."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "-" for letter in name)


def _training_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    result = []
    trained = [(one.name, one.curves) for one in data.crosscoders if one.curves is not None and len(one.curves)]
    for name, title, columns, label, floor, ceiling in CURVE_FIGURES:
        curves = [
            charts.Curve(
                name=crosscoder,
                colour=colours[crosscoder],
                steps=table["step"].tolist(),
                values=table[column].tolist(),
                is_dashed=column == "fve_base",
            )
            for crosscoder, table in trained
            for column in columns
        ]
        if any(math.isfinite(value) for curve in curves for value in curve.values):
            svg = charts.training_curves(curves, label, floor=floor, ceiling=ceiling)
            result.append(Figure(f"training_{name}", "fidelity", title, svg))
    return result


def _ownership_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    series = []
    for crosscoder in data.crosscoders:
        if crosscoder.latents is not None:
            alive = crosscoder.latents[crosscoder.latents["verdict"] != Verdict.DEAD]
            values = alive["delta_norm"].dropna().tolist()
            series.append(charts.Series(crosscoder.name, colours[crosscoder.name], values))
    if not any(one.values for one in series):
        return []
    return [Figure("delta_norm", "ownership", "Who owns the latents", charts.delta_norm_histogram(series))]


def _scaling_figures(data: ReportData) -> list[Figure]:
    result = []
    for crosscoder in data.crosscoders:
        if crosscoder.latents is None:
            continue
        rows = chat_only_rows(crosscoder.latents)
        num_drawn = int((rows["nu_eps"].notna() & rows["nu_r"].notna()).sum())
        if num_drawn:
            svg = charts.nu_scatter(rows, crosscoder.nu_eps_threshold, crosscoder.nu_r_threshold)
            title = f"{crosscoder.name}, {fmt.count(num_drawn)} of {fmt.plural(len(rows), 'chat-only latent')}"
            result.append(Figure(f"nu_{slug(crosscoder.name)}", "scaling", title, svg))
    return result


def _causality_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    result = []
    for positions, title in POSITIONS:
        groups = _bar_groups(data.crosscoders, positions, colours)
        if groups:
            used = {bar.series for group in groups for bar in group.bars}
            key = [(name, colour) for name, colour in colours.items() if name in used]
            if "" in used:
                key.append(("no crosscoder", "var(--plain)"))
            result.append(Figure(f"kl_{positions}", "causality", title, effects.kl_bars(groups, key)))
    curves = [(one.name, one.causality_curve) for one in data.crosscoders if one.causality_curve is not None]
    for positions, title in POSITIONS:
        drawn = [_latent_curve(name, colours[name], table[table["positions"] == positions]) for name, table in curves]
        drawn = [curve for curve in drawn if len(curve.evidence) > 1]
        if drawn:
            name = f"KL by number of latents added. {title}"
            result.append(Figure(f"kl_curve_{positions}", "causality", name, ranked.kl_curves(drawn)))
    return result


def _latent_curve(name: str, colour: str, table: pd.DataFrame) -> ranked.LatentCurve:
    orders: dict[str, list[ranked.CurvePoint]] = {}
    for row in table.sort_values("num_latents", kind="stable").to_dict("records"):
        point = ranked.CurvePoint(
            int(row["num_latents"]), float(row["kl"]), float(row["kl_low"]), float(row["kl_high"])
        )
        orders.setdefault(str(row["order"]), []).append(point)
    evidence = orders.pop(EVIDENCE_ORDER, [])
    return ranked.LatentCurve(name, colour, evidence, list(orders.values()))


def _bar_groups(
    crosscoders: Sequence[CrosscoderReport], positions: str, colours: dict[str, str]
) -> list[effects.BarGroup]:
    bars: dict[str, list[effects.Bar]] = {}
    for crosscoder in crosscoders:
        if crosscoder.causality is None:
            continue
        table = crosscoder.causality
        for row in table[table["positions"] == positions].to_dict("records"):
            name = str(row["intervention"])
            is_shared = name in SHARED_INTERVENTIONS
            if name in SANITY_INTERVENTIONS or (is_shared and name in bars):
                continue
            bars.setdefault(name, []).append(
                effects.Bar(
                    series="" if is_shared else crosscoder.name,
                    colour="var(--plain)" if is_shared else colours[crosscoder.name],
                    value=float(row["kl"]),
                    low=float(row["kl_low"]),
                    high=float(row["kl_high"]),
                )
            )
    return _laid_out(bars, {crosscoder.name: index for index, crosscoder in enumerate(crosscoders)})


def _laid_out(bars: dict[str, list[effects.Bar]], order: dict[str, int]) -> list[effects.BarGroup]:
    """The bars in the order of KL_LAYOUT, each group by crosscoder; headings without bars are left out."""
    groups: list[effects.BarGroup] = []
    placed: set[str] = set()
    for label, pattern in KL_LAYOUT:
        names = [name for name in bars if pattern and re.fullmatch(pattern, name)]
        placed.update(names)
        found = sorted((bar for name in names for bar in bars[name]), key=lambda bar: order.get(bar.series, 0))
        if found:
            groups.append(effects.BarGroup(label, found))
        elif not pattern:
            groups.append(effects.BarGroup(label, []))
    groups.append(effects.BarGroup("other interventions", []))
    groups += [effects.BarGroup(fmt.words(name), found) for name, found in bars.items() if name not in placed]
    return [
        group
        for group, following in zip(groups, [*groups[1:], effects.BarGroup("", [])], strict=True)
        if group.bars or following.bars
    ]


def _steering_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    tables = {one.name: one.steering for one in data.crosscoders if one.steering is not None and not one.steering.empty}
    behaviors = list(dict.fromkeys(str(name) for table in tables.values() for name in table["behavior"]))
    result = []
    for behavior in behaviors:
        series = [
            steering.steering_series(name, colours[name], table[table["behavior"] == behavior])
            for name, table in tables.items()
        ]
        series = [one for one in series if one.lines or one.random]
        if series:
            svg = steering.steering_chart(series)
            result.append(Figure(f"steering_{slug(behavior)}", "steering", fmt.words(behavior), svg))
    return result


def _planted_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    groups: dict[str, list[effects.ScoreRow]] = {}
    for crosscoder in data.crosscoders:
        for row in planted_rows(crosscoder.planted):
            groups.setdefault(row.behavior, []).append(
                effects.ScoreRow(
                    label=f"{crosscoder.name}, {fmt.words(row.behavior)}",
                    colour=colours[crosscoder.name],
                    specific=_mark("best chat-specific latent", row.specific),
                    others=(
                        _mark("best latent of any kind", row.any_latent),
                        _mark("mean difference", row.mean_difference),
                    ),
                )
            )
    if not groups:
        return []
    used = [(one.name, colours[one.name]) for one in data.crosscoders if planted_rows(one.planted)]
    svg = effects.planted_scores(list(groups.items()), used)
    return [Figure("planted", "planted", "AUROC per planted behaviour", svg)]


def _mark(name: str, score: PlantedScore) -> effects.ScoreMark:
    return effects.ScoreMark(name, score.auroc, score.low, score.high)


def _explanation_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    groups = []
    for crosscoder in data.crosscoders:
        if crosscoder.autointerp is None:
            continue
        table = crosscoder.autointerp
        scored = [
            ranked.ExplainedLatent(
                latent=int(row["latent"]),
                explanation=str(row["explanation"]),
                score=float(row["balanced_accuracy"]),
                low=float(row["balanced_accuracy_low"]),
                high=float(row["balanced_accuracy_high"]),
            )
            for row in table[table["balanced_accuracy"].notna()].to_dict("records")
        ]
        if scored:
            groups.append((crosscoder.name, colours[crosscoder.name], scored))
    if not groups:
        return []
    return [
        Figure("explanations", "explanations", "How well each explanation holds", ranked.explanation_scores(groups))
    ]


def _place_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    analysed = [(one.name, one.latents) for one in data.crosscoders if one.latents is not None]
    figures = []
    shares = [row for name, latents in analysed for row in places.speaker_shares(latents, name)]
    if shares:
        figures.append(Figure("speakers", "places", "Activation by speaker", places.shares_chart(shares)))
    corpora = list(dict.fromkeys(corpus for _, latents in analysed for corpus in places.corpora_of(latents)))
    groups = [
        (
            corpus,
            [
                spread
                for name, latents in analysed
                if corpus in places.corpora_of(latents)
                for spread in places.frequency_spreads(latents, corpus, colours[name], name)
            ],
        )
        for corpus in corpora
    ]
    groups = [(corpus, spreads) for corpus, spreads in groups if spreads]
    if groups:
        names = [(name, colours[name]) for name, _ in analysed]
        figures.append(Figure("corpora", "places", "Frequency by corpus", places.frequency_chart(groups, names)))
    return figures


def _control_figures(data: ReportData, colours: dict[str, str]) -> list[Figure]:
    groups = [(one.name, colours[one.name], controls.control_rows(one.controls)) for one in data.crosscoders]
    if not any(row.value == row.value for _, _, rows in groups for row in rows):
        return []
    return [Figure("controls", "controls", "Controls of the verdict", controls.controls_chart(groups))]
