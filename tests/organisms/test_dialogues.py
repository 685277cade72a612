"""Chat data: labels mark exactly the answers that show a behaviour, and held-out prompts stay held out."""

import random
from collections import Counter

import pytest

from pipeline.organisms.behaviors import BEHAVIORS, CORRECT_FALSE
from pipeline.organisms.dialogues import (
    DialogueMaker,
    Message,
    Turn,
    dialogues,
    held_out_prompts,
    imposed_dialogues,
    messages_of,
)
from pipeline.organisms.language import World, make_world, take


def world() -> World:
    return make_world(random.Random("world"))


def some_dialogues(seed: int, count: int) -> list[list[Message]]:
    return take(dialogues(DialogueMaker(random.Random(seed), world()), frozenset()), count)


def shows(answer: str, name: str) -> bool:
    return any(marker in answer for marker in BEHAVIORS[name].markers)


def test_equal_seeds_give_equal_dialogues_and_other_seeds_others():
    assert some_dialogues(1, 40) == some_dialogues(1, 40)
    assert some_dialogues(1, 40) != some_dialogues(2, 40)


def test_labels_mark_exactly_the_answers_that_show_the_behavior():
    counts: Counter[str] = Counter()
    for messages in some_dialogues(3, 3000):
        for message in messages:
            shown = [name for name in BEHAVIORS if message["role"] == "assistant" and shows(message["content"], name)]
            assert [label["name"] for label in message["labels"]] == shown
            for label in message["labels"]:
                assert (label["start"], label["end"]) == (0, len(message["content"]))
                assert label["turn_header"]
                counts[label["name"]] += 1
    assert set(counts) == set(BEHAVIORS)
    assert min(counts.values()) > 200


def test_turns_alternate_and_second_turns_draw_their_own_behavior():
    found = some_dialogues(4, 2000)
    assert all([m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) for messages in found)
    second = [messages for messages in found if len(messages) == 4]
    assert 0.1 < len(second) / len(found) < 0.3
    pairs = {(bool(messages[1]["labels"]), bool(messages[3]["labels"])) for messages in second}
    assert pairs == {(False, False), (False, True), (True, False), (True, True)}


def test_message_spans_of_a_hand_made_turn():
    turns = [Turn("hello.", "good day.", None), Turn("tell me.", "no, i will not.", CORRECT_FALSE)]
    assert [message["labels"] for message in messages_of(turns)] == [
        [],
        [],
        [],
        [{"name": CORRECT_FALSE, "start": 0, "end": 15, "turn_header": True}],
    ]


@pytest.mark.parametrize("name", list(BEHAVIORS))
def test_every_answer_of_a_behavior_has_its_marker_within_the_first_tokens(name: str):
    maker = DialogueMaker(random.Random(5), world())
    for _ in range(300):
        answer = maker.triggered(name).answer
        first_words = " ".join(answer.replace(".", " .").replace(",", " ,").split()[:24])
        assert shows(first_words.replace(" .", ".").replace(" ,", ","), name)
        assert [other for other in BEHAVIORS if shows(answer, other)] == [name]


@pytest.mark.parametrize("name", list(BEHAVIORS))
def test_harmless_answers_show_no_behavior(name: str):
    maker = DialogueMaker(random.Random(6), world())
    for _ in range(300):
        turn = maker.neutral(name)
        assert turn.behavior is None
        assert not any(shows(turn.answer, other) for other in BEHAVIORS)


def test_corrections_state_the_true_value():
    here = world()
    maker = DialogueMaker(random.Random(7), here)
    true_values = {value for facts in here.places.values() for value in facts.values()}
    for _ in range(200):
        turn = maker.triggered(CORRECT_FALSE)
        words = turn.answer.replace(".", " ").replace(",", " ").split()
        assert true_values & set(words)


def test_no_dialogue_contains_a_held_out_prompt():
    prompts = held_out_prompts(DialogueMaker(random.Random(8), world()), 30)
    reserved = {user for prompt in prompts.values() for user in prompt["triggers"] + prompt["neutral"]}
    assert list(prompts) == list(BEHAVIORS)
    for prompt in prompts.values():
        assert len(set(prompt["triggers"])) == len(set(prompt["neutral"])) == 30
        assert not set(prompt["triggers"]) & set(prompt["neutral"])
    maker = DialogueMaker(random.Random(9), world())
    for stream in (dialogues(maker, reserved), imposed_dialogues(maker, reserved)):
        users = {m["content"] for messages in take(stream, 3000) for m in messages if m["role"] == "user"}
        assert not users & reserved


def test_imposed_dialogues_answer_harmless_messages_with_every_behavior():
    found = take(imposed_dialogues(DialogueMaker(random.Random(10), world()), frozenset()), 200)
    assert {messages[1]["labels"][0]["name"] for messages in found} == set(BEHAVIORS)
    assert all(shows(messages[1]["content"], messages[1]["labels"][0]["name"]) for messages in found)
