"""Texts, scales, conditions and addresses, as a visitor types them."""

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import InputError
from pipeline.explorer.address import MAX_LETTERS, View, address, view_of
from pipeline.explorer.asked import scales_of, text_of
from pipeline.explorer.conditions import search_of

COLUMNS = (
    "latent",
    "verdict",
    "is_confident",
    "reason",
    "nu_eps",
    "nu_r",
    "frequency",
    "template_frac",
    "control_token",
)
TEXTS = ("verdict", "reason", "control_token")


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "latent": np.arange(4),
            "verdict": ["chat-specific", "stronger in chat", "shared", "dead"],
            "is_confident": [True, False, False, False],
            "reason": ["nu low", "", "both hold it", ""],
            "nu_eps": [0.1, 0.2, 0.9, np.nan],
            "nu_r": [0.1, 0.3, 0.3, np.nan],
            "frequency": [0.01, 0.0005, 0.002, 0.0],
            "template_frac": [0.9, 0.1, 0.6, np.nan],
            "control_token": ["<end>", None, "", ""],
        }
    )


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", [0, 1, 2, 3]),
        ("nu_r<0.3 and frequency>1e-3", [0]),
        ("nu_r <= 0.3, frequency > 0.1%", [0, 2]),
        ("nu_r=0.3", [1, 2]),
        ("nu_r!=0.3", [0]),  # a missing number fulfils nothing
        ("template>50%", [0, 2]),
        ("fires on>0.1%", [0, 2]),  # the report's heading
        ("3", [3]),
        ("1 3", [1, 3]),
        ('verdict="stronger in chat"', [1]),
        ("verdict!=dead nu_r>0", [0, 1, 2]),
        ("is_confident=true", [0]),
        ("CHAT", [0, 1]),
        ("hold it", [2]),
        ("<end>", [0]),
        ("no-such-word", []),
    ],
)
def test_a_search_holds_for_the_latents_that_fulfil_all_of_it(
    table: pd.DataFrame, typed: str, expected: list[int]
) -> None:
    search = search_of(typed, COLUMNS, TEXTS, ("is_confident",))
    assert np.flatnonzero(search.holds(table)).tolist() == expected
    assert set(search.columns) <= set(COLUMNS)


@pytest.mark.parametrize(
    ("typed", "named"),
    [("nu_q<0.3", "nu_r"), ("nu_r<low", "low"), ("verdict<3", "<"), ("is_confident>2", "true or false")],
)
def test_a_search_that_cannot_be_understood_is_refused_with_its_word(typed: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        search_of(typed, COLUMNS, TEXTS, ("is_confident",))


def test_turns_and_json_are_dialogues_and_anything_else_is_a_text() -> None:
    messages = [{"role": "user", "content": "Hello\nthere?"}, {"role": "assistant", "content": "Yes."}]
    assert text_of("User: Hello\nthere?\nAssistant: Yes.\n") == messages
    assert text_of('[{"role": "user", "content": "a"}]') == [{"role": "user", "content": "a"}]
    for plain in ("He said:\nUser: no", "[1, 2]", "[unfinished", "Users: many"):
        assert text_of(plain) == plain


@pytest.mark.parametrize("typed", ["", " \n", '[{"role": "user"}]', '[{"role": "user", "content": 3}]'])
def test_nothing_and_half_messages_are_refused(typed: str) -> None:
    with pytest.raises(InputError, match="text"):
        text_of(typed)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("12", {12: 1.0}),
        ("12=2.5, 40 = -0.5", {12: 2.5, 40: -0.5}),
        ("7:1e-1 8", {7: 0.1, 8: 1.0}),
    ],
)
def test_scales_are_read(typed: str, expected: dict[int, float]) -> None:
    assert scales_of(typed) == expected


@pytest.mark.parametrize("typed", ["", "twelve", "12=much", "12=", "-3=1", "1=1.2.3"])
def test_other_scales_are_refused(typed: str) -> None:
    with pytest.raises(InputError, match="latents"):
        scales_of(typed)


def test_an_address_gives_back_its_view() -> None:
    view = View("find", "l1", condition="nu_r<0.3 & x", fires="a=b&c <script>", silent="\u202eü", page=3, sort="-nu_r")
    query = address(view)
    assert query.startswith("?view=find&") and "<" not in query and " " not in query
    from urllib.parse import parse_qsl

    assert view_of(dict(parse_qsl(query[1:]))) == view
    steer = View("steer", prompt="p", steer="1=2", tokens=9, temperature=0.5, random=2)
    assert view_of(dict(parse_qsl(address(steer)[1:]))) == steer
    assert address(View()) == "?view=text"


def test_a_text_too_long_for_an_address_is_left_out() -> None:
    for text in ("a" * (MAX_LETTERS + 1), "\u4e2d" * (MAX_LETTERS // 9 + 1)):
        assert address(View(text=text)) == "?view=text"
    assert len(address(View(text="a" * MAX_LETTERS))) > MAX_LETTERS


@pytest.mark.parametrize("query", [{"view": "home"}, {"latent": "x"}, {"order": "1"}, {"temperature": "hot"}])
def test_an_address_that_names_nothing_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(query))):
        view_of(query)


def test_other_parameters_of_an_address_are_left_alone() -> None:
    assert view_of({"__theme": "dark", "text": "a"}) == View(text="a")
