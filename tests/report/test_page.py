"""The page as text: numbers appear, hostile text stays text, gaps are stated, and the embedded data are safe JSON."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.report.data import CrosscoderReport, EvidenceReport, ReportData
from pipeline.report.figures import vega_runtime
from pipeline.report.formatting import visible
from pipeline.report.headlines import does_sentences
from pipeline.report.latent_rows import MAX_TABLE_ROWS, script_json
from pipeline.report.latents import LatentCard, card_sources, latent_cards
from pipeline.report.lead import lead
from pipeline.report.page import SECTIONS, flat_settings, render
from pipeline.report.summary import verdict_summary
from pipeline.report.verdict import verdict_text
from pipeline.schema import Verdict

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"\'><b onclick="x">',
    "<!--",
    "\u2028",
]
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Outline(HTMLParser):
    """Elements, ids and visible text of a page; raises where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"href", "src"}:
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without an opening tag"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


@pytest.fixture(scope="module")
def page(report: ReportData) -> str:
    return render(report)


def embedded(page: str) -> dict[str, list[Any]]:
    found = re.search(r'<script type="application/json" id="latent-data">(.*?)</script>', page, re.S)
    assert found is not None
    content: dict[str, list[Any]] = json.loads(found[1])
    return content


def cards_of(crosscoder: CrosscoderReport, index: int) -> list[LatentCard]:
    return latent_cards(crosscoder, card_sources(crosscoder, index))


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Outline(page).text))


def test_page_is_one_well_nested_file_without_outside_references(page: str) -> None:
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert {section for section, _ in SECTIONS} <= set(outline.ids)
    assert all(link.startswith("#") or link == "data:," for link in outline.links)
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)
    assert page.count(vega_runtime()) == 1
    ours = page.replace(vega_runtime(), "")
    assert "http:" not in re.sub(r"http://www\.w3\.org/(2000/svg|1999/xlink)", "", ours)
    assert "https:" not in ours
    assert "default-src 'none'" in page


def test_headings_step_down_one_level_at_a_time(page: str) -> None:
    shown = re.sub("<template.*?</template>", "", page, flags=re.S)
    levels = [int(tag[1]) for tag in Outline(shown).tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_numbers_of_the_tables_appear(report: ReportData, page: str) -> None:
    text = text_of(page)
    for crosscoder in report.crosscoders:
        assert crosscoder.latents is not None
        counts = verdict_summary(crosscoder.latents)
        assert f"{counts.num_specific} ({counts.num_confident_specific})" in text
        assert f"between {counts.num_confident_specific} and {counts.most_specific}" in text
    for number in ("0.872", "0.879", "0.482 to 0.198", "0.98 [0.97, 1.00]", "412,345 tokens", "40,000", "9f2c41d07be3"):
        assert number in text
    assert "crosscoders[1].threshold_decay" in text
    assert "s3://bucket/runs/demo/corpus" in text


def test_hostile_text_never_becomes_markup(make_report: Callable[..., ReportData]) -> None:
    data = make_report(hostile=True)
    attack = "".join(HOSTILE) + "\x00"
    unpaired = attack + "\ud800"
    samples = data.crosscoders[0].steering_samples
    assert samples is not None
    steering, planted = data.crosscoders[0].steering, data.crosscoders[0].planted
    assert steering is not None
    assert planted is not None
    attacked = dataclasses.replace(
        data.crosscoders[0],
        name=unpaired,
        steering_samples=samples.assign(prompt=attack, answer=attack, behavior=attack),
        steering=steering.assign(behavior=attack),
        planted=planted.assign(behavior=attack),
        settings={unpaired: unpaired},
    )
    data = dataclasses.replace(
        data, crosscoders=[attacked, data.crosscoders[1]], settings={unpaired: {attack: unpaired}}
    )
    hostile, plain = render(data), render(make_report())
    assert Outline(hostile).tags.count("script") == Outline(plain).tags.count("script") == 4
    assert "img" not in Outline(hostile).tags
    assert Outline(hostile).handlers == []
    assert "alert(1)" in text_of(hostile)
    assert "\x00" not in hostile
    hostile.encode("utf-8")
    assert embedded(hostile)["crosscoders"][0] == unpaired


def test_embedded_json_survives_a_round_trip_and_cannot_end_its_element() -> None:
    content = {"rows": [*HOSTILE, "&amp;", 'a"b\\c'], "none": None}
    text = script_json(content)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == content


def test_embedded_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        script_json([float("nan")])


def test_empty_chat_only_set_reads_well(null_report: ReportData) -> None:
    text = text_of(render(null_report))
    assert "0 latents are new in the chat model" in text
    assert "is chat-only by its decoder norm or by the evidence" in text
    assert "No chat-only latent has both ratios" in text
    assert not re.search(r"\bnan\b", text, re.I)


def test_missing_analyses_are_stated_and_leave_no_broken_section(bare_report: ReportData) -> None:
    page = render(bare_report)
    text = text_of(page)
    for sentence in (
        "No verdict",
        "planted behaviours were not scored",
        "strongest contexts were not collected",
        "no answer was generated with steering",
        "no language model was asked",
        "no KL was measured",
        "controls were not run",
        "latents were not analysed",
        "fidelity was not measured",
        "No training curves",
    ):
        assert sentence in text
    assert "Not run for l1, batchtopk" in text
    assert not {"svg", "figure"} & set(Outline(page).tags)


def test_a_run_without_a_latent_to_steer_with_says_so(report: ReportData) -> None:
    first = report.crosscoders[0]
    assert first.steering is not None
    unsteered = first.steering[first.steering["latent"] < 0]
    changed = dataclasses.replace(
        report, crosscoders=(dataclasses.replace(first, steering=unsteered), *report.crosscoders[1:])
    )
    assert f"Nothing was steered for {first.name}" in text_of(render(changed))
    assert "Nothing was steered for" not in text_of(render(report))


SILENT = (
    "histograms",
    "neighbours",
    "logit_lens",
    "first_tokens",
    "curves",
    "twins",
    "seeds",
    "causality_curve",
    "causality_differences",
)
"""Tables whose lack is said elsewhere, or that belong to another table's analysis."""


@pytest.mark.parametrize(
    "field", ["latents", "causality", "steering", "examples", "planted", "autointerp", "controls", *SILENT]
)
def test_any_single_table_may_be_missing_or_empty(report: ReportData, field: str) -> None:
    for replacement in (None, getattr(report.crosscoders[0], field).iloc[:0]):
        changed: dict[str, Any] = {field: replacement}
        one = dataclasses.replace(report.crosscoders[0], **changed)
        text = text_of(render(dataclasses.replace(report, crosscoders=[one])))
        if field not in SILENT:
            assert ("Not run for l1" if replacement is None else "Nothing to show for l1") in text


def test_a_run_without_crosscoders_says_so(report: ReportData) -> None:
    empty = dataclasses.replace(report, crosscoders=[], lineage=[], settings={})
    assert "no crosscoder, so there is no verdict" in text_of(render(empty))


def test_cards_put_planted_finders_first_and_scale_opacity_by_the_strongest(report: ReportData) -> None:
    cards = cards_of(report.crosscoders[1], 1)
    assert all(card.verdict == Verdict.CHAT_SPECIFIC for card in cards)
    assert all(card.behaviors for card in cards[:4])
    assert not any(card.behaviors for card in cards[4:])
    shares = [token.share for card in cards for context in card.contexts for token in context.tokens]
    assert max(shares) == 1
    assert min(shares) == 0


def test_a_card_names_the_tokens_of_its_own_latent(report: ReportData, page: str) -> None:
    for card in cards_of(report.crosscoders[1], 1):
        assert [one.member for one in card.tokens] == ["In the chat model", "More than in the base model"]
        assert all(one.promoted[0] == f" refuse{card.latent}" for one in card.tokens)
        assert all(one.suppressed == [" sure", " yes"] for one in card.tokens)
    text = text_of(page)
    assert "In the chat model it promotes" in text
    assert text.count("refuse90001") == 1  # the first tokens' table stands once, whatever the number of crosscoders
    assert "0.250" in text


def test_a_card_shows_how_strongly_its_own_latent_fires_and_what_is_near(report: ReportData, page: str) -> None:
    for card in cards_of(report.crosscoders[1], 1):
        by_corpus = {own.corpus: [bar.num_rows for bar in own.bars] for own in card.histograms}
        has_web = card.latent % 2 == 0
        assert by_corpus["chat"] == [40 + card.latent, 0, 7 + card.latent, 0, 1 + card.latent]
        assert by_corpus["web"] == [0, 3 + card.latent if has_web else 0, 0, 0, 0]
        assert [one.latent for one in card.neighbours] == [(card.latent + step) % 2048 for step in (1, -1)]
        strongest = card.contexts[0].activation
        assert [one.activation / strongest for one in card.weaker] == pytest.approx([0.4, 0.28, 0.16])
    text = text_of(page)
    assert "How strongly it fires" in text and "Nearest decoder rows" in text
    assert "0.90 (0.31)" in text


def test_cards_fall_back_to_other_chat_only_latents(report: ReportData) -> None:
    one = report.crosscoders[0]
    assert one.latents is not None
    latents = one.latents.assign(verdict=one.latents["verdict"].replace(Verdict.CHAT_SPECIFIC, Verdict.UNDECIDED))
    cards = cards_of(dataclasses.replace(one, latents=latents), 0)
    assert cards
    assert {card.verdict for card in cards} == {Verdict.UNDECIDED}


def test_control_characters_are_made_visible() -> None:
    assert visible("a\nb\tc\x00\x1b\ud800") == "a\u21b5b\u21e5c\ufffd\ufffd\ufffd"
    assert visible("a\u202eb\u2069\u2028c") == "a\ufffdb\ufffd\u21b5c", "marks that turn the direction of what follows"


def test_table_holds_all_but_shared_and_dead_latents(report: ReportData, page: str) -> None:
    rows = embedded(page)["rows"]
    expected = 0
    for crosscoder in report.crosscoders:
        assert crosscoder.latents is not None
        expected += int((~crosscoder.latents["verdict"].isin([Verdict.SHARED, Verdict.DEAD])).sum())
    # Winners of "any latent" are listed too, whatever their verdict.
    assert expected <= len(rows) <= expected + 16
    total = sum(len(crosscoder.latents) for crosscoder in report.crosscoders if crosscoder.latents is not None)
    assert f"{total - len(rows):,} shared, dead or further latents" in text_of(page)


def test_page_of_a_large_crosscoder_stays_usable(report: ReportData) -> None:
    one = report.crosscoders[0]
    assert one.latents is not None
    many = pd.concat([one.latents] * 36, ignore_index=True)
    many = many.assign(latent=np.arange(len(many)), verdict=Verdict.OTHER)
    large = dataclasses.replace(report, crosscoders=[dataclasses.replace(one, latents=many)])
    assert len(many) > 73_000
    page = render(large)
    assert len(embedded(page)["rows"]) == MAX_TABLE_ROWS
    assert len(page) < 5_000_000


def test_settings_are_flattened_to_dotted_keys() -> None:
    settings = {"a": {"b": [1, 2]}, "c": [{"d": None}, {"d": True}], "e": {}}
    assert list(flat_settings(settings)) == [("a.b", "1, 2"), ("c[0].d", "\u2013"), ("c[1].d", "yes")]


def test_the_page_opens_with_the_answer_of_the_most_trustworthy_crosscoder(report: ReportData, page: str) -> None:
    found = lead(report)
    assert found is not None
    assert found.name == "batchtopk"
    assert found.new.startswith(
        "26 latents of 1,982 are new in the chat model, at least 19 and at most 34 by their 95%"
    )
    assert "10 more look new by decoder norm alone: 3 are artifacts of training, 7 undecided" in found.new
    assert found.sure[0].startswith("At most 1.3 of the 26 are expected to be false (5.0%")
    assert any("told apart by the paired difference" in sentence for sentence in found.does)
    text = text_of(page)
    assert text.index("In short") < text.index("How sure") < text.index(found.does[0])
    alone = lead(dataclasses.replace(report, crosscoders=report.crosscoders[:1]))
    assert alone is not None
    assert (alone.name, alone.why) == ("l1", "")


def test_a_count_whose_intervals_all_agree_has_no_range(report: ReportData) -> None:
    one = report.crosscoders[1]
    assert one.latents is not None
    agreed = one.latents[one.latents["is_confident"] | ~one.latents["ownership"].eq("chat-only")]
    found = lead(dataclasses.replace(report, crosscoders=[dataclasses.replace(one, latents=agreed)]))
    assert found is not None
    assert " are new in the chat model: no 95% interval says otherwise." in found.new


def test_without_a_verdict_nothing_is_said_in_short(bare_report: ReportData, null_report: ReportData) -> None:
    assert lead(bare_report) is None
    nothing = lead(null_report)
    assert nothing is not None
    assert nothing.new.startswith("Nothing: none of ")
    one = dataclasses.replace(null_report.crosscoders[0], controls=None)
    without = lead(dataclasses.replace(null_report, crosscoders=[one]))
    assert without is not None
    assert without.sure == ["Controls were not run: this rests on intervals over documents alone."]
    controls = null_report.crosscoders[0].controls
    assert controls is not None
    undefined = dataclasses.replace(one, controls=controls.assign(value=np.nan))
    silent = lead(dataclasses.replace(null_report, crosscoders=[undefined]))
    assert silent is not None
    assert len(silent.sure) == 1 and "power" in silent.sure[0]  # nothing found says what was not measured


def test_a_difference_that_no_latent_shows_stands_before_nothing(null_report: ReportData) -> None:
    evidence = EvidenceReport(
        is_distinguishable=True, reason="They differ by 1 nat.", distance=pd.DataFrame(), streams=pd.DataFrame()
    )
    found = lead(dataclasses.replace(null_report, evidence=evidence))
    assert found is not None
    assert found.new.startswith("They differ by 1 nat. No latent shows that difference: none of ")


def test_a_poor_crosscoder_says_what_it_lacks_in_place_of_an_answer(report: ReportData) -> None:
    poor = dataclasses.replace(report.crosscoders[1], shortcomings=("it explains 0.31 of the variance",))
    first, none = (
        dataclasses.replace(report, crosscoders=[one, poor])
        for one in (report.crosscoders[0], dataclasses.replace(report.crosscoders[0], shortcomings=("it is short",)))
    )
    found = lead(first)
    assert found is not None and found.name == "l1"  # the other one explains more, and is not good enough
    nobody = lead(none)
    assert nobody is not None and nobody.name == "batchtopk"
    assert "0.31" in nobody.new and " new in the chat model" not in nobody.new
    text = text_of(render(first))
    assert "No verdict yet: it explains 0.31 of the variance." in text
    assert "batchtopk: No verdict yet: it explains 0.31 of the variance." in verdict_text(first).splitlines()


def test_who_explains_most_answers(report: ReportData) -> None:
    l1, batch_topk = report.crosscoders
    assert l1.fidelity is not None
    better = dataclasses.replace(l1, fidelity={**l1.fidelity, "fve_without_sinks": 0.95})
    found = lead(dataclasses.replace(report, crosscoders=[better, batch_topk]))
    assert found is not None and found.name == "l1" and "0.95" in found.why


def test_empty_halves_are_not_compared(report: ReportData) -> None:
    one = report.crosscoders[0]
    assert one.causality is not None
    empty = dataclasses.replace(one, causality=one.causality.assign(num_latents=0))
    assert not any("half" in sentence for sentence in does_sentences(empty))
    assert any("worst half" in sentence for sentence in does_sentences(one))


def test_every_latent_with_contexts_has_one_card_on_the_page_or_in_a_template(report: ReportData, page: str) -> None:
    anchors = {row[3] for row in embedded(page)["rows"] if row[3]}
    ids = Outline(page).ids
    assert all(ids.count(anchor) == 1 for anchor in anchors)
    for place, crosscoder in enumerate(report.crosscoders):
        assert crosscoder.examples is not None
        assert {f"latent-{place}-{latent}" for latent in crosscoder.examples["latent"].unique()} <= anchors
    card = page.split("<template", 2)[1].split("</template>")[0]
    assert 'class="context"' in card
    assert re.findall("<dt>(.*?)</dt>", card)[:3] == ["Delta_norm", "nu_eps", "nu_r"]


def test_twins_and_the_ratio_that_decides_stand_on_the_card(report: ReportData) -> None:
    one = report.crosscoders[1]
    assert one.latents is not None
    latents = one.latents.assign(twin=5, twin_cosine=0.94, twin_divergence=0.31, decoder_norm_base=0.0)
    latents = latents.assign(nu_act_centred=0.12, nu_act_centred_low=0.1, nu_act_centred_high=0.2)
    facts = dict(cards_of(dataclasses.replace(one, latents=latents), 1)[0].facts)
    assert facts["twin"] == "5, cosine 0.94, divergence 0.31"
    assert facts["nu_act, centred"] == "0.12 [0.10, 0.20]"


def test_what_the_models_themselves_say_comes_first(report: ReportData) -> None:
    """No crosscoder outranks it: neither where the models are equal nor where the layer carries little."""
    evidence = EvidenceReport(
        is_distinguishable=False, reason="KL is 0.", distance=pd.DataFrame(), streams=pd.DataFrame()
    )
    one = report.crosscoders[0]
    assert one.latents is not None
    is_specific = one.latents["verdict"] == Verdict.CHAT_SPECIFIC
    latents = one.latents.assign(
        verdict=one.latents["verdict"].replace(Verdict.CHAT_SPECIFIC, Verdict.WITHHELD),
        is_confident=one.latents["is_confident"] & ~is_specific,
    )
    equal = dataclasses.replace(
        report, evidence=evidence, crosscoders=[dataclasses.replace(one, latents=latents, planted=None, steering=None)]
    )
    sentence = f"no latent is called chat-specific ({is_specific.sum()} calls withheld). KL is 0."
    found = lead(equal)
    assert found is not None and sentence in found.new
    assert sentence in text_of(render(equal))
    text = verdict_text(equal).splitlines()
    assert sentence in text[0]
    assert any(line.startswith("  withheld") and str(is_specific.sum()) in line for line in text)
    little = lead(dataclasses.replace(report, layer_note="Layer 2 carries only 1%."))
    assert little is not None and little.new.startswith("Layer 2 carries only 1%. ")
    told = dataclasses.replace(evidence, is_distinguishable=True, reason="The two models differ.")
    assert verdict_text(dataclasses.replace(report, evidence=told)).splitlines()[1] == "The two models differ."
