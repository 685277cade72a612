"""Figures as text: what is drawn follows the numbers, every file is well-formed XML, and edges do not break a chart."""

import dataclasses
import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from pipeline.report import charts, controls, effects, ranked, steering
from pipeline.report.data import ReportData
from pipeline.report.figures import figure_list, figures
from pipeline.report.svg import Axis, Box, Canvas, Scale, frame, legend, linear_ticks, log_ticks, padded_range


def test_every_figure_is_a_well_formed_file_in_fixed_colours(report: ReportData) -> None:
    files = figures(report)
    assert {"delta_norm.svg", "nu_l1.svg", "nu_batchtopk.svg", "kl_all.svg", "kl_first_9.svg"} <= set(files)
    assert {"training_loss.svg", "planted.svg", "steering_refusal_harm.svg", "kl_curve_all.svg"} <= set(files)
    for name, content in files.items():
        ElementTree.fromstring(content)
        assert b"var(--" not in content, name
        assert b'fill="#ffffff"' in content, name


def test_names_that_make_the_same_file_name_keep_both_figures(report: ReportData) -> None:
    twice = [dataclasses.replace(one, name=name) for one, name in zip(report.crosscoders, ("a b", "a:b"), strict=True)]
    assert {"nu_a-b.svg", "nu_a-b_2.svg"} <= set(figures(dataclasses.replace(report, crosscoders=twice)))


def test_figures_follow_the_theme_inside_the_page(report: ReportData) -> None:
    for figure in figure_list(report):
        assert "var(--text)" in figure.svg
        assert not re.search(r"#[0-9a-f]{6}", figure.svg)


def test_a_run_without_analyses_has_no_figure(bare_report: ReportData) -> None:
    assert figures(bare_report) == {}


def test_hostile_names_stay_text(make_report: Callable[..., ReportData]) -> None:
    data = make_report(hostile=True)
    hostile = dataclasses.replace(data.crosscoders[0], name="<script>alert(1)</script>\"'")
    for content in figures(dataclasses.replace(data, crosscoders=[hostile, data.crosscoders[1]])).values():
        assert b"<script" not in content
        ElementTree.fromstring(content)


def test_scale_maps_ends_clamps_beyond_and_takes_logarithms() -> None:
    scale = Scale(0, 10, 100, 200)
    assert [scale(value) for value in (0, 5, 10, 99, -1)] == [100, 150, 200, 200, 100]
    assert Scale(1, 1000, 0, 3, is_log=True)(10) == pytest.approx(1)
    assert Scale(0, 1, 0, 1)(math.inf) == 1


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(-0.1, 1.5, 4) == [0, 0.5, 1.0, 1.5]
    assert log_ticks(0.5, 1200) == [1, 10, 100, 1000]


def test_range_is_never_of_zero_width() -> None:
    for values in ([], [3.0, 3.0], [0.0], [math.nan], [-2.0, 5.0]):
        low, high = padded_range(values)
        assert low < high


def test_frame_and_legend_place_labels_inside_the_canvas() -> None:
    canvas = Canvas(460, 200)
    grown = legend(canvas, [(f"a rather long name {index}", "var(--text)") for index in range(5)])
    assert grown > 0
    assert canvas.height == 200 + grown
    plot = frame(canvas, Box(50, 40, 440, 150), Axis("x", 0, 1), Axis("y", 0, 1))
    assert (plot.x(1), plot.y(1)) == (440, 40)


def test_histogram_counts_are_on_a_log_scale() -> None:
    values = [0.51] * 1000 + [0.99] * 10
    svg = charts.delta_norm_histogram([charts.Series("a", "var(--series-1)", values)])
    path = re.search(r'fill="none" [^>]*', svg) or re.search(r'<path d="([^"]+)" fill="none"', svg)
    assert path is not None
    outline = re.search(r'd="M([^"]+)" fill="none"', svg)
    assert outline is not None
    heights = np.array([[float(number) for number in point.split()] for point in outline[1].split("L")])[:, 1]
    bottom, ten, thousand = heights.max(), heights[-1], heights.min()
    # 1000 and 10 lie log10(1000 / 0.5) and log10(10 / 0.5) above the baseline of half a latent.
    assert (bottom - thousand) / (bottom - ten) == pytest.approx(math.log(2000) / math.log(20), rel=0.01)


def test_scatter_draws_one_dot_per_latent_with_both_ratios(report: ReportData) -> None:
    latents = report.crosscoders[0].latents
    assert latents is not None
    rows = latents[latents["ownership"] == "chat-only"]
    rows = rows[rows["verdict"] != "dead"]
    svg = charts.nu_scatter(rows, 0.2, 0.5)
    assert svg.count("<circle") == int((rows["nu_eps"].notna() & rows["nu_r"].notna()).sum())
    assert ">0.2</text>" in svg
    assert ">0.5</text>" in svg


def test_scatter_of_many_latents_stays_small(report: ReportData) -> None:
    latents = report.crosscoders[0].latents
    assert latents is not None
    random = np.random.default_rng(0)
    many = latents.sample(20_000, replace=True, random_state=0, ignore_index=True).assign(
        verdict="chat-specific", nu_eps=random.normal(0, 1, 20_000), nu_r=random.normal(0, 1, 20_000)
    )
    assert len(charts.nu_scatter(many, 0.2, 0.5)) < 500_000


def test_kl_bar_lengths_are_proportional_and_written_out() -> None:
    bars = [effects.BarGroup(name, [effects.Bar("a", "red", kl, kl, kl)]) for name, kl in (("none", 0.4), ("all", 0.1))]
    svg = effects.kl_bars(bars, [("a", "red")])
    widths = [float(width) for width in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="13"', svg)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.01)
    assert ">0.400</text>" in svg


def test_kl_figure_orders_groups_and_leaves_sanity_checks_to_the_table(report: ReportData) -> None:
    (svg,) = [figure.svg for figure in figure_list(report) if figure.name == "kl_all"]
    labels = re.findall(r">((?:best|worst) half|random halves|none|template|all latents|error|base|chat)</text>", svg)
    halves = ["best half", "random halves", "worst half"]
    assert labels == ["none", "template", "all latents", "error", *halves, *halves]
    assert svg.index(">template</text>") < svg.index(">mean difference</text>") < svg.index(">all latents</text>")
    # Four bars per group of random halves (two seeds, two crosscoders), one where no crosscoder is used, else two.
    assert svg.count('height="13"') == 4 + 2 * 2 + 2 * (4 * 2 + 4)


def test_a_heading_without_bars_is_left_out(report: ReportData) -> None:
    one = report.crosscoders[0]
    assert one.causality is not None
    table = one.causality[one.causality["intervention"].isin(["none", "all", "best_half_replace", "novel_edit"])]
    novel = table.iloc[:1].assign(intervention="novel_edit")
    data = dataclasses.replace(
        report, crosscoders=[dataclasses.replace(one, causality=pd.concat([table, novel], ignore_index=True))]
    )
    (svg,) = [figure.svg for figure in figure_list(data) if figure.name == "kl_all"]
    assert "measured, replaced" in svg
    assert "measured, added" not in svg
    assert "other interventions" in svg
    assert ">novel edit</text>" in svg


def test_undefined_numbers_leave_no_nan_in_a_drawing() -> None:
    nan = math.nan
    drawings = [
        effects.kl_bars([effects.BarGroup("none", [effects.Bar("a", "red", nan, nan, nan)])], []),
        steering.steering_chart(
            [
                steering.SteeringSeries(
                    "a",
                    "red",
                    [steering.SteerLine("chat model", "", [steering.SteerPoint(1.0, 0.5, nan, nan, nan, nan)])],
                    [steering.RandomPoint(1.0, nan, nan, nan, nan, nan)],
                    None,
                )
            ]
        ),
        effects.planted_scores(
            [("b", [effects.ScoreRow("a", "red", effects.ScoreMark("x", nan, nan, nan), [])])], [("a", "red")]
        ),
        charts.training_curves([charts.Curve("a", "red", [0, 1], [nan, 1.0])], "loss", floor=None, ceiling=None),
    ]
    for svg in drawings:
        ElementTree.fromstring(svg)
        assert "nan" not in svg
    assert "no chat-specific latent" in drawings[2]


def test_long_curves_are_thinned_without_changing_their_level() -> None:
    steps = list(range(10_000))
    svg = charts.training_curves([charts.Curve("a", "red", steps, [2.0] * 10_000)], "loss", floor=None, ceiling=None)
    assert len(svg) < 20_000
    assert "ends at 2" in svg


def test_kl_curves_end_where_the_numbers_do_and_keep_0_latents() -> None:
    points = [ranked.CurvePoint(number, 1 - number / 16, math.nan, math.nan) for number in (0, 1, 4, 8)]
    svg = ranked.kl_curves([ranked.LatentCurve("a", "var(--series-1)", points, [points])])
    ElementTree.fromstring(svg)
    ticks = re.findall(r'text-anchor="middle"[^>]*>([\d.]+)</text>', svg)
    assert ticks == ["0", "1", "2", "4", "8"]
    assert svg.count("<circle") == 4
    assert svg.count("stroke-dasharray") == 1
    assert "fill-opacity" not in svg, "no ribbon without an interval"
    assert "a: 8 latents, 0.5000 nats per token" in svg
    with_interval = [point._replace(low=point.kl - 0.1, high=point.kl + 0.1) for point in points]
    assert "fill-opacity" in ranked.kl_curves([ranked.LatentCurve("a", "var(--series-1)", with_interval, [])])


def test_explanations_fall_from_left_to_right_and_hostile_ones_are_text() -> None:
    latents = [ranked.ExplainedLatent(j, "<script>", score, score - 0.1, 1.0) for j, score in ((1, 0.6), (2, 0.9))]
    svg = ranked.explanation_scores([("a", "var(--series-1)", latents)])
    assert "<script" not in svg
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert float(circles[0][0]) < float(circles[1][0])
    assert float(circles[0][1]) < float(circles[1][1])
    one = ranked.explanation_scores([("a", "var(--series-1)", latents[:1])])
    ElementTree.fromstring(one)
    assert "nan" not in one


def test_controls_are_drawn_with_what_they_are_held_against(report: ReportData) -> None:
    rows = controls.control_rows(report.crosscoders[0].controls)
    svg = controls.controls_chart([("a", "var(--series-1)", rows), ("b", "var(--series-2)", [])])
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 3
    assert svg.count('stroke="var(--muted)" stroke-width="2"') == 1
    assert ">b</text>" not in svg


def test_places_are_drawn_for_every_corpus(report: ReportData) -> None:
    found = {figure.name: figure.svg for figure in figure_list(report) if figure.section == "places"}
    assert set(found) == {"speakers", "corpora"}
    for name in (">web</text>", ">chat</text>", ">shared latents</text>"):
        assert name in found["corpora"]
    assert found["speakers"].count("batchtopk, chat-specific: ") == 4


def sweep(**more: object) -> pd.DataFrame:
    """Steering rows of one behaviour: unsteered, one latent at two scales in three places, both models, two random."""
    rows: list[dict[str, object]] = [
        {"model": model, "latent": -1, "control": "none", "positions": "none", "scale": 0.0, "rate": 0.1, "kl": 0.0}
        for model in ("chat", "base")
    ]
    for model, places in (("chat", ("all", "prompt")), ("base", ("all",))):
        for place in places:
            for scale, rate in ((1.0, 0.4), (2.0, 0.8)):
                own = rate if (model, place) == ("chat", "all") else rate / 2
                row = {"model": model, "latent": 7, "control": "latent", "positions": place, "scale": scale}
                rows.append(row | {"rate": own, "kl": scale})
    for latent in (1, 2):
        row = {"model": "chat", "latent": latent, "control": "random", "positions": "all", "scale": 2.0}
        rows.append(row | {"rate": latent / 10, "kl": 0.5})
    return pd.DataFrame(rows).assign(behavior="b", nll=1.0, num_prompts=20).assign(**more)


def test_a_sweep_becomes_a_line_per_model_and_place() -> None:
    series = steering.steering_series("a", "var(--series-1)", sweep())
    assert [(line.label, line.dash) for line in series.lines] == [
        ("chat model", steering.SOLID),
        ("base model", steering.DASHED),
        ("chat model, prompt only", steering.DOTTED),
    ]
    assert [point.rate for point in series.lines[0].points] == [0.4, 0.8]
    assert [point.rate for point in series.lines[1].points] == [0.2, 0.4]
    assert (series.random[0].rate, series.random[0].low, series.random[0].high) == (pytest.approx(0.15), 0.1, 0.2)
    assert series.unsteered is not None
    assert series.unsteered.rate == 0.1
    svg = steering.steering_chart([series])
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 6
    assert "answers that show the behaviour" in svg


def test_prompts_without_markers_have_no_rate_panel() -> None:
    svg = steering.steering_chart([steering.steering_series("a", "var(--series-1)", sweep(rate=math.nan))])
    assert "answers that show the behaviour" not in svg
    assert "KL of the next token" in svg
    assert "nan" not in svg
    assert "<circle" not in svg
