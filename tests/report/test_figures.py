"""Figures as data and as Vega-Lite: what is drawn follows the tables, frames and axes are as they should be, and every
specification compiles. How a figure looks is not tested."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import vl_convert

from pipeline.report.charts import causality, ownership, places, scaling, scores, steering, training
from pipeline.report.charts.selection import Figure
from pipeline.report.charts.style import spec_of
from pipeline.report.data import ReportData
from pipeline.report.figures import figure_list, figures, static_svg
from pipeline.schema import Verdict

PNG = b"\x89PNG\r\n\x1a\n"


def found(data: ReportData) -> dict[str, Figure]:
    return {figure.name: figure for figure in figure_list(data)}


def rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The largest table of a specification."""
    return max(spec["datasets"].values(), key=len)


def layers(spec: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    return [one for one in spec["layer"] if one["mark"]["type"] == mark]


@pytest.fixture(scope="module")
def drawn(report: ReportData) -> dict[str, Figure]:
    return found(report)


def test_the_figures_of_a_full_run_compile_with_named_axes_and_colours_by_role(drawn: dict[str, Figure]) -> None:
    assert {"delta_norm", "nu_l1", "nu_batchtopk", "kl_all", "kl_halves_first_9", "kl_curve_all"} <= set(drawn)
    assert {"training_loss", "planted", "steering_refusal_harm", "speakers", "corpora", "controls"} <= set(drawn)
    assert "fve_l0" in drawn
    for figure in drawn.values():
        compiled = vl_convert.vegalite_to_vega(figure.spec)
        groups = [compiled, *(mark for mark in compiled["marks"] if mark["type"] == "group")]
        titles = [axis.get("title") for group in groups for axis in group.get("axes", [])]
        assert any(titles), figure.name
        assert figure.spec["description"].startswith(figure.title)
        assert not re.search(r"#[0-9a-f]{6}", json.dumps(figure.spec)), figure.name
        assert figure.title
        assert re.fullmatch(r"[\w-]+", figure.name)


def test_files_are_png_and_a_run_without_analyses_has_none(report: ReportData, bare_report: ReportData) -> None:
    one = dataclasses.replace(report.crosscoders[1], steering=None, curves=None, causality=None, causality_curve=None)
    files = figures(dataclasses.replace(report, crosscoders=[one]))
    assert {"delta_norm.png", "nu_batchtopk.png", "controls.png"} <= set(files)
    assert all(content.startswith(PNG) and len(content) > 5_000 for content in files.values())
    assert figures(bare_report) == {}


def test_crosscoders_are_compared_by_fve_and_l0_where_there_are_two(
    report: ReportData, drawn: dict[str, Figure]
) -> None:
    points = rows(drawn["fve_l0"].spec)
    assert [point["crosscoder"] for point in points] == [one.name for one in report.crosscoders]
    for point, one in zip(points, report.crosscoders, strict=True):
        assert one.fidelity is not None and one.latents is not None
        assert point["fve"] == pytest.approx(one.fidelity["fve"]) and point["l0"] == pytest.approx(one.fidelity["l0"])
        assert int(point["specific"]) == (one.latents["verdict"] == Verdict.CHAT_SPECIFIC).sum()
    assert "fve_l0" not in found(dataclasses.replace(report, crosscoders=report.crosscoders[:1]))


def test_names_that_make_the_same_file_name_keep_both_figures(report: ReportData) -> None:
    twice = [dataclasses.replace(one, name=name) for one, name in zip(report.crosscoders, ("a b", "a:b"), strict=True)]
    assert {"nu_a-b", "nu_a-b_2"} <= set(found(dataclasses.replace(report, crosscoders=twice)))


def test_drawings_for_readers_without_javascript_follow_the_theme_and_share_no_id(drawn: dict[str, Figure]) -> None:
    ids: list[str] = []
    for name in ("nu_l1", "training_loss", "kl_all"):
        svg = static_svg(drawn[name])
        ElementTree.fromstring(svg)
        assert "var(--text)" in svg
        ids += re.findall(r'id="([^"]+)"', svg)
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
    assert ids
    assert len(ids) == len(set(ids))


def test_hostile_names_stay_text(make_report: Callable[..., ReportData]) -> None:
    data = make_report(hostile=True)
    name = "<script>alert(1)</script>\"'\u202eevil\u2066var(--nothing)"
    hostile = dataclasses.replace(data.crosscoders[0], name=name, steering=None, curves=None)
    for figure in figure_list(dataclasses.replace(data, crosscoders=[hostile])):
        svg = static_svg(figure)
        assert "<script" not in svg
        assert not {"\u202e", "\u2066"} & set(svg + json.dumps(figure.spec, ensure_ascii=False) + figure.title)
        ElementTree.fromstring(svg)


def test_altair_is_imported_only_where_a_report_is_rendered() -> None:
    code = "import sys, pipeline.stages.report; sys.exit(bool({'altair', 'vl_convert'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_histogram_counts_are_on_a_log_scale_with_the_classes_of_the_analysis() -> None:
    table = pd.DataFrame({"crosscoder": "a", "delta_norm": [0.51] * 1000 + [0.995] * 10 + [math.nan]})
    bins = ownership.binned(table).set_index("start")["num_latents"]
    assert (bins[0.5], bins[0.98], bins.sum(), len(bins)) == (1000, 10, 1010, 50)
    spec = spec_of(ownership.delta_norm_chart(table, ["a"]), "")
    (line,) = layers(spec, "line")
    assert line["encoding"]["y"]["scale"] == {"type": "log", "domain": [0.5, 3000], "nice": False}
    bands = next(table for table in spec["datasets"].values() if len(table) == 3)
    assert [(band["name"], band["a"], band["b"]) for band in bands][-1] == ("chat-only", 0.9, 1.0)


def test_scatter_draws_one_dot_per_latent_with_both_ratios_and_its_card(
    report: ReportData, drawn: dict[str, Figure]
) -> None:
    latents = report.crosscoders[0].latents
    assert latents is not None
    own = latents[latents["verdict"].isin(Verdict.CHAT_ONLY)]
    own = own[own["nu_eps"].notna() & own["nu_r"].notna()]
    dots = rows(drawn["nu_l1"].spec)
    assert {dot["latent"]: dot["card"] for dot in dots} == {j: f"latent-0-{j}" for j in own["latent"]}
    assert f"{len(own)} of " in drawn["nu_l1"].title


def test_scatter_frames_the_middle_of_the_ratios_and_counts_what_lies_outside() -> None:
    ratios = np.linspace(0, 0.3, 97)
    table = pd.DataFrame({"nu_eps": [*ratios, 40.0, 2.0, -9.0], "nu_r": 0.1})
    low, high = scaling.framed(table["nu_eps"], 0.2)
    assert -0.1 < low < 0
    assert 0.3 < high < 0.5
    assert scaling.num_outside(table, 0.2, 0.5) == 3
    assert scaling.framed(pd.Series([0.01, 0.02]), 0.5)[1] >= 0.75, "the threshold is inside, with room beside it"


def test_curves_count_the_latents_below_every_threshold() -> None:
    table = pd.DataFrame({"crosscoder": ["a"] * 4 + ["b"], "nu_act": [0.1, -0.3, 0.31, np.nan, 0.0]})
    counts = scaling.counts_below(table, "nu_act").set_index(["crosscoder", "threshold"])["num_latents"]
    assert [counts["a", threshold] for threshold in (0.0, 0.1, 0.12, 0.32, 1.0)] == [0, 0, 1, 3, 3]
    assert counts["b", 0.0] == 0 and counts["b", 0.02] == 1


def test_scatter_of_many_latents_stays_small(report: ReportData) -> None:
    latents = report.crosscoders[0].latents
    assert latents is not None
    random = np.random.default_rng(0)
    many = latents.sample(20_000, replace=True, random_state=0, ignore_index=True).assign(
        verdict="chat-specific", nu_eps=random.normal(0, 1, 20_000), nu_r=random.normal(0, 1, 20_000)
    )
    one = dataclasses.replace(report.crosscoders[0], latents=many)
    figure = found(dataclasses.replace(report, crosscoders=[one]))["nu_l1"]
    assert len(json.dumps(figure.spec)) < 600_000
    assert "Of the 20,000 latents about 3,000 are drawn" in figure.note


def test_kl_of_whole_edits_starts_at_0_and_leaves_sanity_checks_to_the_table(drawn: dict[str, Figure]) -> None:
    spec = drawn["kl_all"].spec
    labels = list(dict.fromkeys(row["label"] for row in rows(spec)))
    edits = list(causality.WHOLE_EDITS.values())
    assert labels == edits
    assert layers(spec, "point")[0]["encoding"]["y"]["sort"] == edits
    assert layers(spec, "point")[0]["encoding"]["x"]["scale"] == {"domainMin": 0}
    assert layers(spec, "point")[0]["encoding"]["x"]["title"] == "KL to the chat model, nats per token"
    plain = [row for row in rows(spec) if row["crosscoder"] == causality.NO_CROSSCODER]
    assert len(plain) == 8, "interventions without a crosscoder are drawn once"
    assert len(rows(spec)) == 8 + 2 * 2


def test_kl_of_halves_has_an_axis_of_its_own_and_the_unedited_kl_as_a_line(drawn: dict[str, Figure]) -> None:
    spec = drawn["kl_halves_all"].spec
    labels = list(dict.fromkeys(row["label"] for row in rows(spec)))
    assert labels[:3] == ["replaced: best half", "replaced: random halves", "replaced: worst half"]
    assert len(labels) == 10
    # Four dots per row of random halves (two seeds, two crosscoders), else two.
    assert len(rows(spec)) == 2 * 4 + 8 * 2
    assert spec["datasets"][spec["layer"][0]["data"]["name"]] == [{"kl": 0.482, "what": "no edit"}]
    assert layers(spec, "point")[0]["encoding"]["x"]["scale"]["zero"] is False
    assert "does not start at 0" in drawn["kl_halves_all"].note


def test_an_intervention_that_is_not_known_is_drawn_under_its_own_name(report: ReportData) -> None:
    one = report.crosscoders[0]
    assert one.causality is not None
    table = one.causality[one.causality["intervention"].isin(["none", "all"])]
    novel = pd.concat([table, table.iloc[:1].assign(intervention="novel_edit")], ignore_index=True)
    data = dataclasses.replace(report, crosscoders=[dataclasses.replace(one, causality=novel)])
    drawn = found(data)
    assert [row["label"] for row in rows(drawn["kl_all"].spec)] == ["no edit", "all latents", "novel edit"]
    assert "kl_halves_all" not in drawn


def test_undefined_numbers_are_left_out_or_null() -> None:
    frame = pd.DataFrame({"intervention": ["none", "all"], "kl": [math.nan, 0.2], "crosscoder": "a"})
    assert list(causality.intervention_rows(frame, halves=False)["label"]) == ["all latents"]
    curve = pd.DataFrame({"crosscoder": "a", "model": "", "step": [0.0, 1.0], "value": [math.nan, 1.0]})
    assert len(training.thinned(curve)) == 1
    lines = sweep(kl=math.nan).assign(rate=0.5)
    spec = spec_of(steering.steering_chart(steering.sweep_lines(lines).assign(crosscoder="a", card=None), ["a"]), "")
    assert "NaN" not in json.dumps(spec)


def test_the_frame_of_a_curve_tells_15_from_16() -> None:
    step = np.arange(0, 1500, 20.0)
    parts = [
        pd.DataFrame({"crosscoder": "l1", "model": "", "step": step, "value": 15 + 500 * np.exp(-step / 80)}),
        pd.DataFrame({"crosscoder": "batch_topk", "model": "", "step": step, "value": 16.0}),
    ]
    curves = pd.concat(parts, ignore_index=True)
    low, high = training.framed_range(curves)
    assert 1 / (high - low) > 0.1, "a tenth of the axis or more between 15 and 16"
    assert training.num_outside(curves) == int((curves["value"] > high).sum()) > 10
    spec = spec_of(training.curve_chart(curves, "L0, active latents per row", ["l1", "batch_topk"]), "")
    y = layers(spec, "line")[0]["encoding"]["y"]
    assert (y["title"], y["scale"]["domain"]) == ("L0, active latents per row", [low, high])
    flat = curves[curves["crosscoder"] == "batch_topk"]
    assert training.framed_range(flat) == pytest.approx((15.2, 16.8))


def test_long_curves_are_thinned_without_changing_their_level(drawn: dict[str, Figure]) -> None:
    steps = np.arange(10_000.0)
    curve = training.thinned(pd.DataFrame({"crosscoder": "a", "step": steps, "value": 2.0}))
    assert len(curve) == training.MAX_CURVE_POINTS
    assert set(curve["value"]) == {2.0}
    assert curve["step"].mean() == pytest.approx(steps.mean(), rel=0.01)
    assert re.match(r"At the end: l1 [\d.]+, batchtopk [\d.]+\.", drawn["training_l0"].note)
    assert {row["model"] for row in rows(drawn["training_fve"].spec)} == {"base", "chat"}


def test_kl_curves_keep_0_latents_and_tell_evidence_from_random(report: ReportData, drawn: dict[str, Figure]) -> None:
    spec = drawn["kl_curve_all"].spec
    curves = [one.causality_curve for one in report.crosscoders]
    expected = [table[table["positions"] == "all"] for table in curves if table is not None]
    assert len(rows(spec)) == sum(len(table) for table in expected)
    x = layers(spec, "line")[0]["encoding"]["x"]
    assert (x["scale"]["type"], x["axis"]["values"][:4]) == ("symlog", [0, 1, 2, 4])
    evidence = [row for row in rows(spec) if row["is_evidence"]]
    assert {row["order"] for row in evidence} == {"evidence"}
    assert evidence[0]["spelled"] == "0.4800 [0.4650, 0.4950]"


def test_explanations_fall_from_left_to_right_within_their_crosscoder() -> None:
    ends = {"balanced_accuracy_low": 0.5, "balanced_accuracy_high": 1.0, "card": None, "explanation": "<script>"}
    table = pd.DataFrame({"crosscoder": ["b", "a", "a"], "latent": [3, 1, 2], "balanced_accuracy": [0.9, 0.6, 0.8]})
    drawn = rows(spec_of(scores.explanation_chart(table.assign(**ends), ["a", "b"]), ""))
    assert [(row["latent"], row["rank"]) for row in drawn] == [(2, 0), (1, 1), (3, 3)]


def test_planted_scores_open_the_card_of_their_latent(report: ReportData, drawn: dict[str, Figure]) -> None:
    planted = rows(drawn["planted"].spec)
    best = [row for row in planted if row["candidate"] == scores.CANDIDATE_SPECIFIC]
    assert len(best) == 8
    assert all(row["card"] == f"latent-{int(row['crosscoder'] == 'batchtopk')}-{row['latent']}" for row in best)
    assert all(row["card"] is None for row in planted if row["candidate"] == scores.CANDIDATE_MEAN_DIFFERENCE)
    assert layers(drawn["planted"].spec, "point")[0]["encoding"]["x"]["scale"]["domain"] == [0.5, 1]


def test_a_behaviour_without_a_chat_specific_latent_is_named(null_report: ReportData) -> None:
    assert "No chat-specific latent for refusal harm (l1)" in found(null_report)["planted"].note


def test_controls_are_drawn_with_what_they_are_held_against(drawn: dict[str, Figure]) -> None:
    table = rows(drawn["controls"].spec)
    assert [row["control"] for row in table[:3]] == ["stated error", "random directions", "seed l1_seed1"]
    assert [row["expected"] for row in table[:3]] == [None, 0.0, None]
    assert layers(drawn["controls"].spec, "tick")[0]["transform"] == [{"filter": "isValid(datum.expected)"}]


def test_places_by_hand() -> None:
    verdicts = [Verdict.CHAT_SPECIFIC] * 4 + [Verdict.SHARED] * 2
    table = pd.DataFrame({"crosscoder": "a", "verdict": verdicts, "template_frac": [0.6, 0.5, 0.9, 0.1, 0.9, 0.9]})
    table = table.assign(user_frac=0.05, assistant_frac=0.05)
    table = table.assign(frequency_web=[0.1, 0.2, 0.3, 0.4, 0.5, 0.5], frequency_chat=math.nan)
    spreads = places.frequency_spreads(table, ["web", "chat"])
    assert list(spreads["label"]) == ["web, chat-specific", "web, shared"]
    specific = spreads.iloc[0]
    assert (specific["num_latents"], specific["median"], specific["p25"]) == (
        4,
        pytest.approx(0.25),
        pytest.approx(0.175),
    )
    shares = places.speaker_shares(table)
    assert list(shares["share"][:4]) == pytest.approx([0.525, 0.05, 0.05, 0.375])
    assert shares.groupby("label")["share"].sum().tolist() == pytest.approx([1, 1])
    spec = spec_of(places.frequency_chart(spreads, ["a"]), "")
    assert layers(spec, "rule")[0]["encoding"]["x"]["scale"] == {"type": "log", "domain": [0.1, 1]}


def sweep(**more: object) -> pd.DataFrame:
    """Steering rows of one behaviour: unsteered, one latent at two scales in three places, both models, two random."""
    table: list[dict[str, object]] = [
        {"model": model, "latent": -1, "control": "none", "positions": "none", "scale": 0.0, "rate": 0.1, "kl": 0.0}
        for model in ("chat", "base")
    ]
    for model, where in (("chat", ("all", "prompt")), ("base", ("all",))):
        for place in where:
            for scale, rate in ((1.0, 0.4), (2.0, 0.8)):
                own = rate if (model, place) == ("chat", "all") else rate / 2
                row = {"model": model, "latent": 7, "control": "latent", "positions": place, "scale": scale}
                table.append(row | {"rate": own, "kl": scale})
    for latent in (1, 2):
        row = {"model": "chat", "latent": latent, "control": "random", "positions": "all", "scale": 2.0}
        table.append(row | {"rate": latent / 10, "kl": 0.5})
    return pd.DataFrame(table).assign(behavior="b", nll=1.0, num_prompts=20).assign(**more)


def test_a_sweep_becomes_a_line_per_model_and_place() -> None:
    lines = steering.sweep_lines(sweep())
    assert list(dict.fromkeys(lines["line"])) == [
        "chat model",
        "base model",
        "chat model, prompt only",
        "random latents",
        "unsteered",
    ]
    rates = {str(line): rows["rate"].tolist() for line, rows in lines.groupby("line")}
    assert rates["chat model"] == [0.4, 0.8]
    assert rates["base model"] == [0.2, 0.4]
    assert rates["unsteered"] == [0.1]
    random = lines[lines["line"] == "random latents"].iloc[0]
    assert (random["rate"], random["rate_low"], random["rate_high"]) == (pytest.approx(0.15), 0.1, 0.2)
    spec = spec_of(steering.steering_chart(lines.assign(crosscoder="a", card=None), ["a"]), "")
    titles = [layers(panel, "line")[0]["encoding"]["y"]["title"] for panel in spec["vconcat"]]
    assert titles[0] == "answers that show the behaviour, % of prompts"
    dash = layers(spec["vconcat"][0], "line")[0]["encoding"]["strokeDash"]["scale"]
    assert dict(zip(dash["domain"], dash["range"], strict=True))["chat model, prompt only"] == [1, 3]
    assert len(rows(spec)) == len(lines) == 8


def test_prompts_without_markers_have_no_rate_panel() -> None:
    lines = steering.sweep_lines(sweep(rate=math.nan)).assign(crosscoder="a", card=None)
    spec = spec_of(steering.steering_chart(lines, ["a"]), "")
    titles = [layers(panel, "line")[0]["encoding"]["y"]["title"] for panel in spec["vconcat"]]
    assert len(titles) == 2
    assert titles[0].startswith("KL of the next token")
