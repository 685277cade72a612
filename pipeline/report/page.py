"""The HTML report: one file that needs no network, made from a ReportData by one Jinja2 template.

The template (templates/report.html) is rendered with autoescape. Style, script and the Vega runtime are written into
the page, and a content security policy with the scripts' hashes keeps anything else from running, whatever a corpus
contains. This file only prepares what the template shows; numbers come from summary.py, figures from figures.py.
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

from pipeline.analyses.activation_statistics import control_token_counts
from pipeline.analyses.autointerp import accuracy_groups
from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.figures import figure_list, page_specs, static_svg, vega_runtime
from pipeline.report.headlines import Headline, headline
from pipeline.report.latent_rows import latent_table, script_json
from pipeline.report.latents import CardSources, LatentCard, card_sources, latent_cards, other_cards
from pipeline.report.lead import lead
from pipeline.report.palette import VERDICT_ROLES, css_variables, series_colours
from pipeline.report.summary import (
    NO_SCORE,
    HalfWay,
    PlantedRow,
    SteeringEffect,
    VerdictSummary,
    anchor,
    half_way,
    num_template_latents,
    planted_rows,
    replication,
    steering_effects,
    verdict_summary,
)
from pipeline.report.verdict import verdict_table
from pipeline.schema import DELTA_NORM_RANGES, Ownership, Verdict

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
    counts: VerdictSummary | None
    segments: list[Segment]
    sources: CardSources
    cards: list[LatentCard]
    """On the page."""
    other_cards: list[LatentCard]
    """Opened from the table or a figure."""
    owners: dict[str, int]
    """Live latents by class of Delta_norm; empty where latents were not analysed."""
    half_way: HalfWay | None
    differences: list[dict[str, object]]
    """Paired differences between halves, controls and baselines; without those from no intervention at all."""
    explained: list[dict[str, object]]
    """How well explanations hold by nu and by strength (autointerp.accuracy_groups); empty without explanations."""
    num_template: int
    """Chat-specific latents that fire mostly on template tokens."""
    control_tokens: dict[str, int]
    """How many of them fire mostly on one control token, by that token."""


class Outcome(NamedTuple):
    """One planted or steered behaviour under one crosscoder."""

    behavior: str
    view: View
    planted: PlantedRow | None
    effect: SteeringEffect | None


def render(data: ReportData) -> str:
    """The whole page as HTML text; no part of it is fetched from anywhere."""
    scripts, style = [vega_runtime(), asset("report.js")], asset("report.css")
    found = figure_list(data)
    views = [_view(crosscoder, index, data) for index, crosscoder in enumerate(data.crosscoders)]
    table = latent_table(data, [(view.sources, [*view.cards, *view.other_cards]) for view in views])
    page = (
        environment()
        .get_template("report.html")
        .render(
            data=data,
            views=views,
            sections=SECTIONS,
            scripts=[Markup(script) for script in scripts],
            script_hashes=" ".join(f"'{_hash(script)}'" for script in scripts),
            style=Markup(f":root{{{css_variables()}}}\n{style}"),
            lead=lead(data),
            verdict_rows=verdict_table(data.crosscoders),
            outcomes=_outcomes(views),
            samples=[group for view in views for group in view.sources.groups],
            figures={section: [one for one in found if one.section == section] for section, _ in SECTIONS},
            figure_json=Markup(script_json(page_specs(found))),
            drawing=lambda figure: Markup(static_svg(figure)),
            first_tokens=_first_tokens(data),
            table=table,
            table_json=Markup(table.json),
            settings=list(flat_settings(data.settings)),
            replication=replication,
            no_score=NO_SCORE,
            flat_settings=flat_settings,
            ownership_classes=_ownership_classes(),
            interpreted=[one for one in views if one.report.autointerp is not None and len(one.report.autointerp)],
            max_explanations=MAX_EXPLANATIONS,
            controlled=[one for one in views if one.report.controls is not None and len(one.report.controls)],
        )
    )
    return printable_html(page)


def printable_html(page: str) -> str:
    """Without lone surrogates and NUL, which may come from a corpus; neither can stand in an HTML file."""
    return page.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


def asset(name: str) -> str:
    """The text of a file beside the templates."""
    return resources.files("pipeline.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The script as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _ownership_classes() -> list[tuple[str, str]]:
    """Classes by Delta_norm from chat-only down, each with its range."""
    ranges = sorted(DELTA_NORM_RANGES.items(), key=lambda item: -item[1][0])
    return [*((name, f"{low:g} to {high:g}") for name, (low, high) in ranges), (Ownership.OTHER, "between these")]


@functools.cache
def environment() -> Environment:
    """The templates, with the functions that they use."""
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
        fmt.visible,
        fmt.percent_interval,
    ):
        environment.filters[function.__name__] = function
        environment.globals[function.__name__] = function
    environment.tests["empty"] = _is_empty
    return environment


def _is_empty(table: Sequence[object]) -> bool:
    return len(table) == 0


def _view(crosscoder: CrosscoderReport, index: int, data: ReportData) -> View:
    counts = None if crosscoder.latents is None else verdict_summary(crosscoder.latents)
    sources = card_sources(crosscoder, index)
    cards = latent_cards(crosscoder, sources)
    return View(
        place=index,
        report=crosscoder,
        colour=series_colours([one.name for one in data.crosscoders])[crosscoder.name],
        headline=headline(crosscoder),
        counts=counts,
        segments=[] if counts is None else _segments(counts),
        sources=sources,
        cards=cards,
        other_cards=other_cards(crosscoder, sources, [card.latent for card in cards]),
        owners={} if crosscoder.latents is None else _owners(crosscoder.latents),
        half_way=half_way(crosscoder.causality_curve),
        differences=_differences(crosscoder.causality_differences),
        explained=_explained(crosscoder),
        num_template=0 if crosscoder.latents is None else num_template_latents(crosscoder.latents),
        control_tokens={} if crosscoder.latents is None else control_token_counts(crosscoder.latents),
    )


def _first_tokens(data: ReportData) -> list[dict[str, object]]:
    """Rows of the first tokens' table, which all crosscoders share; empty where it was off."""
    tables = [one.first_tokens for one in data.crosscoders if one.first_tokens is not None]
    rows = tables[0].to_dict("records") if tables else []
    return [{str(key): value for key, value in row.items()} for row in rows]


def _differences(table: pd.DataFrame | None) -> list[dict[str, object]]:
    if table is None:
        return []
    shown = table[(table["intervention"] != "none") & (table["positions"] != "rest")]
    return [{str(key): value for key, value in row.items()} for row in shown.to_dict("records")]


def _explained(crosscoder: CrosscoderReport) -> list[dict[str, object]]:
    if crosscoder.autointerp is None or crosscoder.latents is None or crosscoder.autointerp.empty:
        return []
    groups = accuracy_groups(crosscoder.autointerp, crosscoder.latents)
    return [{str(key): value for key, value in row.items()} for row in groups.to_dict("records")]


def _owners(latents: pd.DataFrame) -> dict[str, int]:
    alive = latents[latents["verdict"] != Verdict.DEAD]
    return {str(name): int(number) for name, number in alive["ownership"].value_counts().items()}


def _segments(counts: VerdictSummary) -> list[Segment]:
    """Parts of the chat-only latents, confident chat-specific ones first; only those that occur."""
    unsure = counts.num_specific - counts.num_confident_specific
    parts = [
        Segment("chat-specific, confident", counts.num_confident_specific, "specific"),
        Segment("chat-specific, not confident", unsure, "specific-soft"),
    ]
    parts += [
        Segment(verdict, counts.by_verdict[verdict], VERDICT_ROLES[verdict])
        for verdict in Verdict.CHAT_ONLY
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
