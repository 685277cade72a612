"""The page in a real browser: no script error, no request, and everything a reader can press does what it says.

Drives a Chromium that is already installed, through Playwright, headless; skips where there is none. Covers sorting and
filtering, both themes, narrow screens, print, and links into closed blocks; what the page says is tested as text in
test_page.py.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.report.data import ReportData
from pipeline.report.page import SECTIONS, render
from pipeline.schema import Verdict

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), "")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="none of chromium, chromium-browser and google-chrome is installed"),
]


@pytest.fixture(scope="module")
def path(make_report: Callable[..., ReportData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render(make_report(hostile=True)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        yield context
        context.close()


class Visit:
    """One open page and everything it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page()
        self.page.set_default_timeout(120_000)  # two tests at a time on two cores, each with a browser or a cluster
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._refuse)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        self.page.goto(path.as_uri())
        if self.page.evaluate("localStorage.getItem('crossray-theme')"):  # of a test before this one
            self.page.evaluate("localStorage.removeItem('crossray-theme')")
            self.page.reload()
        self.page.wait_for_selector("html[data-figures=drawn]")

    def _refuse(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def column(self, number: int) -> list[str]:
        """Texts of one column of the latent table, counted from 1."""
        texts: list[str] = self.page.locator(f"#latent-table tbody td:nth-child({number})").all_inner_texts()
        return texts

    def background(self) -> str:
        colour: str = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        pixels: int = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return pixels


@pytest.fixture
def visit(browser: Any, path: Path) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def go(**options: Any) -> Visit:
        visits.append(Visit(browser, path, **options))
        return visits[-1]

    yield go
    for one in visits:
        one.page.close()
        assert one.complaints == []
        assert {url for url in one.requests if not url.startswith(("file:", "data:"))} == set()


def test_the_filters_stand_in_the_address(visit: Callable[..., Visit], path: Path) -> None:
    page = visit().page
    everything = page.locator("#f-count").inner_text()
    page.select_option("#f-verdict", label=Verdict.CHAT_SPECIFIC)
    page.fill("#f-text", "nu_r<0.3 fires>0.1%")
    page.check("#f-confident")
    address, count = page.url, page.locator("#f-count").inner_text()
    assert "#table?" in address and "nu_r" in address
    other = visit().page
    other.goto(address)
    other.wait_for_selector("html[data-figures=drawn]")
    assert (
        other.locator("#f-text").input_value() == "nu_r<0.3 fires>0.1%" and other.locator("#f-confident").is_checked()
    )
    assert other.locator("#f-count").inner_text() == count != everything
    page.fill("#f-text", "")
    page.uncheck("#f-confident")
    page.select_option("#f-verdict", "")
    assert page.url.endswith("#table")


def test_page_opens_in_silence_with_every_section_visible(visit: Callable[..., Visit], path: Path) -> None:
    page = visit().page
    for section, title in SECTIONS:
        assert page.locator(f"#{section} > h2").inner_text() == title
        assert page.locator(f"#{section}").bounding_box()["height"] > 60
    assert page.locator("figure svg").count() >= 12
    assert page.locator("figure svg").first.bounding_box()["width"] > 300
    assert path.stat().st_size < 4_000_000


def test_table_sorts_both_ways_by_any_column(visit: Callable[..., Visit]) -> None:
    opened = visit()
    head = opened.page.locator("#latent-table thead th", has_text="Delta_norm")
    head.locator("button").click()
    values = [float(text) for text in opened.column(6)]
    assert values == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")
    values = [float(text) for text in opened.column(6)]
    assert values == sorted(values)
    assert head.get_attribute("aria-sort") == "ascending"
    opened.page.locator("#latent-table thead th", has_text="nu_eps").locator("button").click()
    texts = opened.column(7)
    values = [float(text) for text in texts if text != "\u2013"]
    assert values == sorted(values)


def test_table_filters_by_verdict_crosscoder_text_and_confidence(visit: Callable[..., Visit]) -> None:
    opened = visit()
    page = opened.page
    total = int(page.locator("#f-count").inner_text().split(" of ")[1].split()[0].replace(",", ""))
    page.select_option("#f-verdict", label="shrinkage artifact")
    assert set(opened.column(2)) == {"shrinkage artifact"}
    page.select_option("#f-crosscoder", label="batchtopk")
    assert set(opened.column(1)) == {"batchtopk"}
    page.select_option("#f-verdict", label="all")
    page.check("#f-confident")
    assert set(opened.column(3)) == {"yes"}
    page.uncheck("#f-confident")
    page.select_option("#f-crosscoder", label="all")
    page.fill("#f-text", "REFUSAL")
    assert opened.column(5)
    assert all("refusal" in text for text in opened.column(5))
    latent = opened.column(4)[0]
    page.fill("#f-text", latent)
    assert set(opened.column(4)) == {latent}
    page.fill("#f-text", "no such thing")
    assert opened.column(4) == []
    page.fill("#f-text", "")
    assert len(opened.column(4)) == 200 < total
    page.click("#f-more")
    assert len(opened.column(4)) == min(400, total)


def test_dark_differs_from_light_by_system_and_by_button(visit: Callable[..., Visit]) -> None:
    light, dark = visit(), visit(scheme="dark")
    assert light.background() == "rgb(255, 255, 255)"
    assert dark.background() != light.background()
    dots = ".headline .swatch"
    colour = "element => getComputedStyle(element).backgroundColor"
    assert light.page.locator(dots).first.evaluate(colour) != dark.page.locator(dots).first.evaluate(colour)
    light.page.click("#theme")
    assert light.background() == dark.background()
    light.page.click("#theme")
    assert light.background() == "rgb(255, 255, 255)"


@pytest.mark.parametrize("width", [320, 400, 768, 1100, 1600])
def test_page_never_scrolls_sideways(visit: Callable[..., Visit], width: int) -> None:
    opened = visit(width=width)
    opened.page.evaluate("for (const block of document.querySelectorAll('details')) block.open = true")
    assert opened.overflow() <= 0


def test_six_crosscoders_with_long_names_still_fit(
    browser: Any, make_report: Callable[..., ReportData], tmp_path: Path
) -> None:
    data = make_report()
    many = [dataclasses.replace(data.crosscoders[i % 2], name=f"{'difference_sae' * 4}_{i}") for i in range(6)]
    file = tmp_path / "many.html"
    file.write_text(render(dataclasses.replace(data, run_name="run" * 60, crosscoders=many)), encoding="utf-8")
    for width in (400, 1280):
        opened = Visit(browser, file, width=width)
        assert opened.overflow() <= 0
        assert opened.complaints == []
        opened.page.close()


def test_figures_stay_readable_on_a_narrow_screen(visit: Callable[..., Visit]) -> None:
    page = visit(width=400).page
    measure = "nodes => nodes.filter(node => node.textContent).map(node => node.getBoundingClientRect().height)"
    heights = page.locator("figure svg text").evaluate_all(measure)
    assert min(heights) >= 10


def test_figures_follow_the_theme_and_say_what_they_show(visit: Callable[..., Visit]) -> None:
    page = visit().page
    text = page.locator("#figure-delta_norm .role-axis-title text").first
    colour = "element => getComputedStyle(element).fill"
    light = text.evaluate(colour)
    dark = visit(scheme="dark").page.locator("#figure-delta_norm .role-axis-title text").first
    assert dark.evaluate(colour) != light  # before the button is pressed: the browser keeps that choice
    page.click("#theme")
    assert text.evaluate(colour) != light
    page.click("#theme")
    assert text.evaluate(colour) == light
    assert page.locator("#figure-nu_l1").get_attribute("aria-label").startswith("l1, ")


def test_a_dot_names_its_latent_and_opens_its_card(visit: Callable[..., Visit]) -> None:
    page = visit().page
    dots = page.locator("#figure-nu_l1 .mark-symbol.role-mark path")
    labels = [str(dots.nth(index).get_attribute("aria-label")) for index in range(dots.count())]
    latents = [found[1] for label in labels if (found := re.search(r"latent: (\d+)", label))]
    has_card = [page.locator(f"#latent-0-{latent}").count() == 1 for latent in latents]
    for index in (has_card.index(False), has_card.index(True)):
        dots.nth(index).hover()
        tooltip = page.locator("#vg-tooltip-element")
        tooltip.wait_for(state="visible")
        assert re.search(rf"latent\s+{latents[index]}\s", tooltip.inner_text())
        dots.nth(index).click()
        if has_card[index]:
            page.locator(f"#latent-0-{latents[index]}").wait_for(state="visible")
        else:
            numbers = page.locator("#latent-table tbody tr:not(.opened) td:nth-child(4)")
            assert numbers.all_inner_texts() == [latents[index]]


def test_without_javascript_the_figures_stand_as_drawings(browser: Any, path: Path) -> None:
    page = browser.new_page()
    browser.new_cdp_session(page).send("Emulation.setScriptExecutionDisabled", {"value": True})
    page.goto(path.as_uri())
    assert page.locator("figure svg").count() >= 12
    assert page.locator("figure svg").first.bounding_box()["width"] > 300
    page.close()


def test_link_to_a_card_in_a_closed_block_opens_it(visit: Callable[..., Visit]) -> None:
    page = visit().page
    card = page.locator("details.more .card").first
    assert not card.is_visible()
    page.evaluate("id => { location.hash = id; }", card.get_attribute("id"))
    card.wait_for(state="visible")


def test_hostile_tokens_are_shown_as_text(visit: Callable[..., Visit]) -> None:
    contexts = visit().page.locator(".context", has_text="<script>alert(1)</script>")
    assert contexts.count() > 0


def test_keyboard_reaches_skip_link_and_table(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#latent-table th button").first.focus()
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"


def test_print_opens_every_block_and_hides_controls(visit: Callable[..., Visit]) -> None:
    page = visit().page
    before = page.locator("details[open]").count()
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open]):not([hidden])").count() == 0
    assert not page.locator("nav").is_visible()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == before


def test_a_latents_number_opens_its_card_and_closes_it_again(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.check("#f-cards")
    buttons = page.locator("#latent-table button.open")
    assert buttons.count() == page.locator("#latent-table tbody tr").count() > 30
    for index in (0, buttons.count() - 1):  # one that also stands on the page, one that is drawn from data
        button = buttons.nth(index)
        latent = button.inner_text()
        button.press("Enter")
        card = page.locator("#latent-table tr.opened .card")
        assert card.locator("h4").inner_text() == f"Latent {latent}"
        assert card.locator(".context mark").count() > 0
        assert "nu_eps" in card.locator(".facts").inner_text()
        assert button.get_attribute("aria-expanded") == "true"
        button.click()
        assert card.count() == 0
        assert button.get_attribute("aria-expanded") == "false"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_the_search_takes_conditions_words_and_numbers_together(visit: Callable[..., Visit]) -> None:
    opened = visit()
    page = opened.page
    total = page.locator("#f-count").inner_text()
    page.fill("#f-text", "nu_r<0.2 nu_eps>=0.05")
    ratios = list(zip(opened.column(7), opened.column(8), strict=True))
    assert ratios
    assert all(float(eps) >= 0.05 and float(r) <= 0.2 for eps, r in ratios)
    page.fill("#f-text", "template>50% rivers")
    assert opened.column(13)
    assert all(int(share.rstrip("%")) >= 50 for share in opened.column(13))
    assert all("rivers" in words for words in opened.column(17))
    page.fill("#f-text", "explained>0.9")
    assert all(float(score) > 0.9 for score in opened.column(16))
    page.fill("#f-text", "nonsense>3")
    assert opened.column(4) == []
    page.fill("#f-text", "")
    assert page.locator("#f-count").inner_text() == total


def test_a_hostile_explanation_is_shown_as_text(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.fill("#f-text", "<script>alert(1)</script>")
    assert page.locator("#latent-table tbody tr").count() == 2
    page.locator("#latent-table button.open").first.click()
    assert "<script>alert(1)</script>" in page.locator("tr.opened .words").inner_text()


def test_twenty_thousand_latents_sort_and_filter_without_delay(
    browser: Any, make_report: Callable[..., ReportData], tmp_path: Path
) -> None:
    data = make_report()
    latents = data.crosscoders[0].latents
    assert latents is not None
    many = pd.concat([latents] * 10, ignore_index=True).assign(verdict=Verdict.OTHER)
    many["latent"] = range(len(many))
    file = tmp_path / "many.html"
    one = dataclasses.replace(data.crosscoders[0], latents=many)
    file.write_text(render(dataclasses.replace(data, crosscoders=[one])), encoding="utf-8")
    opened = Visit(browser, file)
    assert opened.page.locator("#f-count").inner_text() == "200 of 20,000 shown"
    sort = "document.querySelectorAll('#latent-table th button')[6].click()"
    search = "document.getElementById('f-text').value = 'nu_r<0.3'; "
    search += "document.getElementById('filters').dispatchEvent(new Event('input'))"
    measure = (
        "() => {{ const start = performance.now(); {}; document.body.offsetHeight; return performance.now() - start; }}"
    )
    times = [opened.page.evaluate(measure.format(action)) for action in (sort, search)]
    assert max(times) < 1000, times
    opened.page.close()
