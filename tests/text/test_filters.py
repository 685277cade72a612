"""Every filter refuses what it names and nothing beside it; the reasons are told apart."""

from typing import Any

import pytest

from pipeline.config.data import FiltersSection
from pipeline.text.documents import read_documents
from pipeline.text.filters import Filters, filter_reason, letter_frac, repeated_frac


def dialogue(roles: str, content: str = "12345") -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": content} for role in roles]


@pytest.mark.parametrize(
    ("filters", "accepted", "refused", "reason"),
    [
        (Filters(min_characters=5), "12345", "1234", "fewer than min_characters"),
        (Filters(max_characters=5), "12345", "123456", "more than max_characters"),
        (Filters(max_repeated_frac=0.5), "ab\nab", "ab\nab\nab", "repeats its lines"),
        (Filters(min_letter_frac=0.5), "\u00e4 1\n", "a12", "too few letters"),
    ],
)
def test_texts(filters: Filters, accepted: str, refused: str, reason: str) -> None:
    assert filter_reason(accepted, None, filters) == ""
    assert filter_reason(refused, None, filters) == reason


@pytest.mark.parametrize(
    ("filters", "accepted", "refused", "reason"),
    [
        (Filters(min_characters=10), "ua", "u", "fewer than min_characters"),
        (Filters(max_characters=10), "ua", "uau", "more than max_characters"),
        (Filters(min_messages=2), "sua", "su", "fewer than min_messages"),
        (Filters(max_messages=2), "sua", "uau", "more than max_messages"),
        (Filters(alternating_roles=True), "suau", "suua", "roles do not alternate"),
        (Filters(alternating_roles=True), "ua", "au", "roles do not alternate"),
        (Filters(alternating_roles=True), "ua", "usa", "roles do not alternate"),
        (Filters(ends_with_assistant=True), "uua", "uau", "does not end with assistant"),
    ],
)
def test_dialogues(filters: Filters, accepted: str, refused: str, reason: str) -> None:
    assert filter_reason(None, dialogue(accepted), filters) == ""
    assert filter_reason(None, dialogue(refused), filters) == reason


def test_no_filter_lets_everything_pass() -> None:
    assert filter_reason("", None, Filters()) == ""
    assert filter_reason(None, dialogue("aassuu", "..."), Filters()) == ""


def test_shares_of_nothing_are_zero() -> None:
    assert repeated_frac([]) == repeated_frac(["\n"]) == letter_frac([" "]) == 0.0
    assert repeated_frac(["one\ntwo", "one"]) == pytest.approx(3 / 9)
    assert letter_frac(["a1 \u4e2d!"]) == 0.5


def test_the_first_reason_is_the_one_that_counts(tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("ok ok ok ok\n\n1\n\n123456\n")
    settings = {"name": "mine", "kind": "text", "split_on": "blank_line"}
    filters = {"min_characters": 2, "min_letter_frac": 0.5}
    found = list(read_documents(str(tmp_path / "a.txt"), {**settings, "filters": filters}))
    assert [document.reason for document in found] == ["", "fewer than min_characters", "too few letters"]


def test_a_run_file_names_every_limit_and_lets_everything_pass_by_default() -> None:
    assert Filters(**FiltersSection().model_dump()) == Filters()
    assert tuple(FiltersSection.model_fields) == Filters._fields
