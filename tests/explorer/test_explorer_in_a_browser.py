"""The explorer over a finished run in a real browser: type, look, open, steer; two visitors; a token; hostile text."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from runs import Finished
from servers import free_port

from pipeline.explorer.server import Explorer, explore

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
HOSTILE = (
    "<script>window.wasRun = 1</script><img src=x onerror='window.wasRun = 1'> ${window.wasRun = 1} {{x}} \u202eab"
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.ray,
    pytest.mark.skipif(not CHROMIUM, reason="none of chromium, chromium-browser and google-chrome is installed"),
]
pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def explorer(finished: Finished) -> Iterator[Explorer]:
    made = explore(finished.path, port=free_port())
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, explorer: Explorer) -> Iterator[Any]:
    """A visitor's page that asks nothing of any other host and has no script error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(120_000)
    faults: list[str] = []
    foreign: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "request", lambda own: None if own.url.startswith((explorer.url, "data:", "blob:")) else foreign.append(own.url)
    )
    opened.goto(explorer.url)
    yield opened
    context.close()
    assert faults == [] and foreign == []


@pytest.fixture(scope="module")
def strongest(finished: Finished) -> tuple[int, list[dict[str, str]]]:
    """A latent that fires most in a dialogue, and that dialogue; the tiny pair has learnt too little for more."""
    examples = finished.table("examples l1", "examples.parquet")
    first = examples[examples["rank"] == 0]
    own = first[first["corpus"] == "dialogues"].sort_values("activation", ascending=False)
    latent = int(own["latent"].iloc[0])
    folder = finished.root / finished.states["corpus"].step.key.folder
    corpus = pd.concat([pd.read_parquet(path) for path in sorted(folder.rglob("*.parquet"))])
    (messages,) = corpus.loc[corpus["doc_id"] == own["doc_id"].iloc[0], "messages"]
    return latent, [{key: one[key] for key in ("role", "content")} for one in json.loads(messages)]


def type_text(page: Any, typed: str) -> None:
    page.get_by_label("text or dialogue").fill(typed)
    page.get_by_role("button", name="Read", exact=True).click()
    page.get_by_role("heading", name="Strongest latents of the text").wait_for()


def test_a_typed_text_leads_to_its_latent_and_to_a_steered_answer(
    page: Any, strongest: tuple[int, list[dict[str, str]]]
) -> None:
    latent, messages = strongest
    type_text(page, json.dumps(messages))
    page.goto(page.url.replace("view=text", "view=text&order=share"))
    page.get_by_role("heading", name="Strongest latents of the text").wait_for()
    link = page.locator("table").first.locator("tbody tr td:first-child a").get_by_text(str(latent), exact=True)
    link.wait_for()
    assert page.get_by_text("KL(chat || base), nats").is_visible()
    link.click()
    page.get_by_role("heading", name=f"Latent {latent}", exact=True).wait_for()
    page.get_by_role("heading", name="Nearest decoder rows").wait_for()
    assert f"latent={latent}" in page.url and "view=latent" in page.url
    page.get_by_role("link", name="steer with it").click()
    page.get_by_label("what a user says, or a dialogue").fill(messages[0]["content"])
    page.get_by_label("latents and scales").fill(f"{latent}=8")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.get_by_text("Done.").wait_for()
    answers = page.locator(".answer .context").all_inner_texts()
    assert len(answers) == 3 and answers[1] != answers[2]
    assert page.get_by_text("KL 0").count() + page.get_by_text("nats per token").count() > 0


def test_what_is_typed_while_an_address_opens_is_read_through_its_crosscoder(page: Any, explorer: Explorer) -> None:
    page.goto(f"{explorer.url}?view=text&crosscoder=batch_topk")
    type_text(page, "A text that nobody waited for.")
    assert page.get_by_label("text or dialogue").input_value() == "A text that nobody waited for."
    assert page.get_by_label("crosscoder").input_value() == "batch_topk"
    page.wait_for_url("**crosscoder=batch_topk**")
    assert page.locator("table").first.locator("tbody tr").count() > 0


def test_an_address_opens_its_view_again(page: Any, explorer: Explorer) -> None:
    page.goto(f"{explorer.url}?view=find&crosscoder=batch_topk&condition=frequency%3E0&sort=-frequency")
    page.locator("table tbody tr").first.wait_for()
    assert page.get_by_label("number, conditions, words").input_value() == "frequency>0"
    shown = page.locator("table tbody tr").count()
    assert 0 < shown <= 50
    page.goto(f"{explorer.url}?view=find&condition=nothing%3C3")
    page.get_by_role("alert").wait_for()
    assert "nothing" in page.get_by_role("alert").inner_text()


def test_hostile_text_stays_text(page: Any) -> None:
    type_text(page, HOSTILE)
    assert page.evaluate("window.wasRun") is None
    assert "<unk>" in page.locator(".typed").inner_text()  # the tokenizer's own word for it looks like a tag too
    assert page.locator(".crossray img, .crossray script").count() == 0


def test_two_visitors_see_what_each_has_asked_for(page: Any, browser: Any, explorer: Explorer) -> None:
    other = browser.new_page()
    other.set_default_timeout(120_000)
    other.goto(f"{explorer.url}?view=latent&latent=2&crosscoder=batch_topk")
    page.goto(f"{explorer.url}?view=latent&latent=1&crosscoder=l1")
    other.get_by_role("heading", name="Latent 2", exact=True).wait_for()
    page.get_by_role("heading", name="Latent 1", exact=True).wait_for()
    assert other.get_by_role("heading", name="Latent 1", exact=True).count() == 0
    other.close()


def test_a_view_is_saved_as_a_page_without_scripts(page: Any, explorer: Explorer) -> None:
    page.goto(f"{explorer.url}?view=latent&latent=1&crosscoder=l1")
    page.get_by_role("heading", name="Latent 1", exact=True).wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save view as HTML").click()
    assert download.value.suggested_filename == "tiny-latent.html"
    text = download.value.path().read_text()
    assert "<script" not in text and "Latent 1" in text and "default-src 'none'" in text


def test_a_token_is_asked_for_and_stands_in_no_address(finished: Finished, browser: Any) -> None:
    token = "a-token-of-many-letters"
    guarded = explore(finished.path, port=free_port(), token=token)
    try:
        opened = browser.new_page()
        opened.set_default_timeout(120_000)
        urls: list[str] = []
        opened.on("request", lambda own: urls.append(own.url))
        assert opened.request.get(f"{guarded.url}config").status == 401
        opened.goto(guarded.url)
        opened.locator("input[type=password]").wait_for()
        opened.locator("input").first.fill("visitor")
        opened.locator("input[type=password]").fill(token)
        opened.get_by_role("button").first.click()
        opened.get_by_label("text or dialogue").wait_for()
        assert not [url for url in urls if token in url]
        opened.close()
    finally:
        guarded.close()
