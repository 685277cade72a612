"""The HTML report: one file that needs no network, made from a ReportData by one Jinja2 template.

The template (templates/report.html) is rendered with autoescape, style and script are written into the page, and a
content security policy with the script's hash keeps anything else from running, whatever a corpus contains. This file
only prepares what the template shows; numbers come from summary.py, charts from figures.py.
"""

import base64
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import formatting as fmt
from pipeline.report.controls import control_rows
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.figures import Figure, figure_list
from pipeline.report.headlines import Headline, headline
from pipeline.report.latent_rows import latent_table
from pipeline.report.latents import CardSources, LatentCard, anchor, card_sources, latent_cards, visible
from pipeline.report.lead import lead
from pipeline.report.palette import VERDICT_ROLES, css_variables, series_colours
from pipeline.report.places import num_template_latents
from pipeline.report.summary import (
    CHAT_ONLY_VERDICTS,
    NO_SCORE,
    HalfWay,
    PlantedRow,
    SteeringEffect,
    VerdictCounts,
    half_way,
    planted_rows,
    steering_effects,
    verdict_counts,
)
from pipeline.report.verdict import verdict_table
from pipeline.schema import Ownership, Verdict

SECTIONS = (
    ("verdict", "Verdict"),
    ("planted", "Planted behaviours"),
    ("latents", "Chat-specific latents"),
    ("table", "All latents"),
    ("explanations", "Explanations"),
    ("steering", "Steering"),
    ("causality", "Causal effect"),
    ("scaling", "Latent Scaling"),
    ("controls", "Controls"),
    ("places", "Where latents fire"),
    ("ownership", "Decoder norms"),
    ("fidelity", "Fidelity"),
    ("settings", "Settings and lineage"),
    ("glossary", "Glossary"),
)
"""Id and title of each section, in the page's order."""

OWNERSHIP_CLASSES = (
    (Ownership.CHAT_ONLY, "0.9 to 1"),
    (Ownership.BASE_ONLY, "0 to 0.1"),
    (Ownership.SHARED, "0.4 to 0.6"),
    (Ownership.OTHER, "between these"),
)
"""Classes by Delta_norm and their ranges (arXiv 2504.02922, section 2)."""


MAX_EXPLANATIONS = 100
"""Explanations listed per crosscoder; the latent table holds all."""


class Segment(NamedTuple):
    """One part of the bar that splits the chat-only latents by verdict."""

    label: str
    number: int
    role: str


class View(NamedTuple):
    """One crosscoder as the template sees it."""

    place: int
    """Position among the report's crosscoders."""
    report: CrosscoderReport
    colour: str
    headline: Headline
    counts: VerdictCounts | None
    segments: list[Segment]
    sources: CardSources
    cards: list[LatentCard]
    owners: dict[str, int]
    """Live latents by class of Delta_norm; empty where latents were not analysed."""
    half_way: HalfWay | None
    differences: list[dict[str, object]]
    """Paired differences between halves, controls and baselines; without those from no intervention at all."""
    num_template: int
    """Chat-specific latents that fire mostly on template tokens."""


class Outcome(NamedTuple):
    """One planted or steered behaviour under one crosscoder."""

    behavior: str
    view: View
    planted: PlantedRow | None
    effect: SteeringEffect | None


def render(data: ReportData) -> str:
    """The whole page as HTML text; no part of it is fetched from anywhere."""
    script, style = _asset("report.js"), _asset("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    views = [_view(crosscoder, index, data) for index, crosscoder in enumerate(data.crosscoders)]
    table = latent_table(data, [(view.sources, view.cards) for view in views])
    page = (
        _environment()
        .get_template("report.html")
        .render(
            data=data,
            views=views,
            sections=SECTIONS,
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            style=Markup(f":root{{{css_variables()}}}\n{style}"),
            lead=lead(data),
            verdict_rows=verdict_table(data),
            outcomes=_outcomes(views),
            samples=[group for view in views for group in view.sources.groups],
            figures=_figures_by_section(figure_list(data)),
            table=table,
            table_json=Markup(table.json),
            settings=list(flat_settings(data.settings)),
            no_score=NO_SCORE,
            flat_settings=flat_settings,
            ownership_classes=OWNERSHIP_CLASSES,
            interpreted=[one for one in views if one.report.autointerp is not None and len(one.report.autointerp)],
            max_explanations=MAX_EXPLANATIONS,
            controlled=[(one, control_rows(one.report.controls)) for one in views if control_rows(one.report.controls)],
        )
    )
    # Lone surrogates and NUL may come from a corpus; neither can stand in an HTML file.
    return page.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


def _asset(name: str) -> str:
    return resources.files("pipeline.report").joinpath("templates", name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        fmt.count,
        fmt.percent,
        fmt.decimal,
        fmt.significant,
        fmt.interval,
        fmt.plural,
        fmt.words,
        anchor,
        visible,
    ):
        environment.filters[function.__name__] = function
        environment.globals[function.__name__] = function
    environment.tests["empty"] = _is_empty
    return environment


def _is_empty(table: Sequence[object]) -> bool:
    return len(table) == 0


def _view(crosscoder: CrosscoderReport, index: int, data: ReportData) -> View:
    counts = None if crosscoder.latents is None else verdict_counts(crosscoder.latents)
    sources = card_sources(crosscoder, index)
    return View(
        place=index,
        report=crosscoder,
        colour=series_colours([one.name for one in data.crosscoders])[crosscoder.name],
        headline=headline(crosscoder),
        counts=counts,
        segments=[] if counts is None else _segments(counts),
        sources=sources,
        cards=latent_cards(crosscoder, sources),
        owners={} if crosscoder.latents is None else _owners(crosscoder.latents),
        half_way=half_way(crosscoder.causality_curve),
        differences=_differences(crosscoder.causality_differences),
        num_template=0 if crosscoder.latents is None else num_template_latents(crosscoder.latents),
    )


def _differences(table: pd.DataFrame | None) -> list[dict[str, object]]:
    if table is None:
        return []
    shown = table[(table["intervention"] != "none") & (table["positions"] != "rest")]
    return [{str(key): value for key, value in row.items()} for row in shown.to_dict("records")]


def _owners(latents: pd.DataFrame) -> dict[str, int]:
    alive = latents[latents["verdict"] != Verdict.DEAD]
    return {str(name): int(number) for name, number in alive["ownership"].value_counts().items()}


def _segments(counts: VerdictCounts) -> list[Segment]:
    """Parts of the chat-only latents, confident chat-specific ones first; only those that occur."""
    unsure = counts.num_specific - counts.num_confident_specific
    parts = [
        Segment("chat-specific, confident", counts.num_confident_specific, "specific"),
        Segment("chat-specific, not confident", unsure, "specific-soft"),
    ]
    parts += [
        Segment(verdict, counts.by_verdict[verdict], VERDICT_ROLES[verdict])
        for verdict in CHAT_ONLY_VERDICTS
        if verdict != Verdict.CHAT_SPECIFIC
    ]
    return [part for part in parts if part.number]


def _outcomes(views: Sequence[View]) -> list[Outcome]:
    """Planted scores joined with steering effects, behaviour by behaviour."""
    found: dict[str, list[Outcome]] = {}
    for view in views:
        effects = {effect.behavior: effect for effect in steering_effects(view.report.steering)}
        planted = {row.behavior: row for row in planted_rows(view.report.planted)}
        for behavior in dict.fromkeys([*planted, *effects]):
            outcome = Outcome(behavior, view, planted.get(behavior), effects.get(behavior))
            found.setdefault(behavior, []).append(outcome)
    return [outcome for outcomes in found.values() for outcome in outcomes]


def _figures_by_section(figures: Sequence[Figure]) -> dict[str, list[tuple[str, Markup]]]:
    """Section -> (title, SVG); svg.py escapes every label."""
    sections: dict[str, list[tuple[str, Markup]]] = {section: [] for section, _ in SECTIONS}
    for figure in figures:
        sections[figure.section].append((figure.title, Markup(figure.svg)))
    return sections


def flat_settings(settings: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested configuration as (dotted key, value on one line)."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from flat_settings(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(settings, (list, tuple)) and any(isinstance(item, Mapping) for item in settings):
        for index, item in enumerate(settings):
            yield from flat_settings(item, f"{prefix}[{index}]")
    else:
        yield prefix, fmt.setting(settings)
