"""Dialogues with reasoning and tools: what becomes a document, and which token is what.

The templates have the structure of those that rewrite earlier turns: one drops the reasoning of answers before the last
question (and writes an empty block where there is none), one drops all reasoning and opens the block in the prompt.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.schema import Flag
from pipeline.text.conversations import conversation_of
from pipeline.text.messages import DialogueError, read_messages
from pipeline.text.templates import REWRITTEN, read_template_shape
from pipeline.text.tokenise import CUT, Tokenise
from pipeline.text.turns import dialogue_documents

DROPS_EARLIER = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}\
{% set content = m.content %}{% set thought = m.reasoning_content if m.reasoning_content is defined else '' %}\
{% if not thought and '</think>' in content %}\
{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}\
{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}\
{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}\
{{ content }}{% for call in m.tool_calls or [] %}{{ '<tool_call>\n{"name": "' + call.function.name + '", ' }}\
{{ '"arguments": ' + call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}\
{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}\
{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

DROPS_ALL = """{% for m in messages %}{% if m.role == 'assistant' %}\
{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}\
{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

QUESTION, FURTHER = {"role": "user", "content": "hello"}, {"role": "user", "content": "again"}
THOUGHT, LATER = "the model", "What is it"
IN_CONTENT = [
    QUESTION,
    {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nworld"},
    FURTHER,
    {"role": "assistant", "content": f"<think>\n{LATER}\n</think>\n\nhello world"},
]
IN_FIELD = [
    QUESTION,
    {"role": "assistant", "content": "world", "reasoning_content": THOUGHT},
    FURTHER,
    {"role": "assistant", "content": "hello world", "reasoning_content": LATER},
]
CALL = {"type": "function", "function": {"name": "capital", "arguments": {"of": "Norland"}}}
WITH_TOOL = [
    QUESTION,
    {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n", "tool_calls": [CALL]},
    {"role": "tool", "content": "Osta"},
    {"role": "assistant", "content": f"<think>\n{LATER}\n</think>\n\nIt is Osta."},
    FURTHER,
    {"role": "assistant", "content": "hello"},
]

Parts = list[tuple[str, str]]
OPEN = "<|im_start|>assistant\n"


def template(build: Callable[..., Any], text: str) -> Any:
    tokenizer = build("qwen")
    tokenizer.chat_template = text
    return tokenizer


def rows(tokenizer: Any, messages: Any, *, doc_id: int = 5000, **settings: Any) -> dict[str, list[Any]]:
    batch = {
        "doc_id": [doc_id],
        "corpus": ["c"],
        "split": ["train"],
        "text": [None],
        "messages": [json.dumps(messages)],
    }
    return Tokenise(tokenizer, **{"max_tokens": 999, **settings})(batch)


def parts(tokenizer: Any, ids: np.ndarray, flags: np.ndarray) -> Parts:
    """Runs of tokens with the same role, SPECIAL aside: letters and text."""
    letters = {
        Flag.TEMPLATE: "t",
        Flag.USER: "u",
        Flag.ASSISTANT: "a",
        Flag.ASSISTANT | Flag.REASONING: "r",
        Flag.TEMPLATE | Flag.REASONING: "c",
        Flag.ASSISTANT | Flag.TOOL: "k",
        Flag.TOOL: "o",
    }
    found: Parts = []
    for index, flag in zip(ids.tolist(), (flags & ~int(Flag.SPECIAL)).tolist(), strict=True):
        letter = letters[Flag(flag & ~int(Flag.HISTORY))].upper() if flag & Flag.HISTORY else letters[Flag(flag)]
        text = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        if found and found[-1][0] == letter:
            found[-1] = (letter, found[-1][1] + text)
        else:
            found.append((letter, text))
    return found


def documents(tokenizer: Any, messages: Any, **settings: Any) -> list[Parts]:
    made = rows(tokenizer, messages, **settings)
    assert made["dropped"] == [""] * len(made["doc_id"]), made["detail"]
    return [parts(tokenizer, ids, flags) for ids, flags in zip(made["input_ids"], made["flags"], strict=True)]


FIRST: Parts = [
    ("t", "<|im_start|>user\n"),
    ("u", "hello"),
    ("t", f"<|im_end|>\n{OPEN}<think>\n"),
    ("r", THOUGHT),
    ("c", "\n</think>\n\n"),
    ("a", "world"),
    ("t", "<|im_end|>\n"),
]
SECOND: Parts = [
    ("T", "<|im_start|>user\n"),
    ("U", "hello"),
    ("T", f"<|im_end|>\n{OPEN}"),
    ("A", "world"),
    ("T", "<|im_end|>\n"),
    ("t", "<|im_start|>user\n"),
    ("u", "again"),
    ("t", f"<|im_end|>\n{OPEN}<think>\n"),
    ("r", LATER),
    ("c", "\n</think>\n\n"),
    ("a", "hello world"),
    ("t", "<|im_end|>\n"),
]


@pytest.mark.parametrize("chat_template", [DROPS_EARLIER, DROPS_ALL], ids=["drops_earlier", "drops_all"])
@pytest.mark.parametrize("messages", [IN_CONTENT, IN_FIELD], ids=["in_content", "in_field"])
def test_a_template_that_drops_earlier_reasoning_gives_one_document_an_answer(
    build_tokenizer: Callable[..., Any], chat_template: str, messages: Any
) -> None:
    tokenizer = template(build_tokenizer, chat_template)
    first, second = documents(tokenizer, messages)
    assert first == FIRST
    kept = "\n\n" if chat_template is DROPS_ALL else ""  # what it leaves of an earlier answer in front of its text
    assert second == [(letter, text + kept if place == 2 else text) for place, (letter, text) in enumerate(SECOND)]


def test_each_document_is_what_the_model_reads_when_it_answers(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = template(build_tokenizer, DROPS_EARLIER)
    made = rows(tokenizer, IN_CONTENT)
    for ids, end in zip(made["input_ids"], (2, 4), strict=True):
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(IN_CONTENT[:end], tokenize=False)


def test_answers_of_one_question_stay_together_and_tools_have_their_bit(build_tokenizer: Callable[..., Any]) -> None:
    first, second = documents(template(build_tokenizer, DROPS_EARLIER), WITH_TOOL)
    call = '<tool_call>\n{"name": "capital", "arguments": {"of": "Norland"}}\n</tool_call>'
    assert first[2:] == [
        ("t", f"<|im_end|>\n{OPEN}<think>\n"),
        ("r", THOUGHT),
        ("c", "\n</think>\n\n"),
        ("k", call),
        ("t", "<|im_end|>\n<|im_start|>user\n<tool_response>\n"),
        ("o", "Osta"),
        ("t", f"\n</tool_response><|im_end|>\n{OPEN}<think>\n"),
        ("r", LATER),
        ("c", "\n</think>\n\n"),
        ("a", "It is Osta."),
        ("t", "<|im_end|>\n"),
    ]
    assert "".join(letter for letter, _ in second) == "TUTKTOTATtutat"
    assert second[-2] == ("a", "hello")


def test_nothing_is_lost_every_word_is_new_in_one_document(build_tokenizer: Callable[..., Any]) -> None:
    for messages in (IN_CONTENT, IN_FIELD, WITH_TOOL):
        made = documents(template(build_tokenizer, DROPS_EARLIER), messages)
        new = [text for own in made for letter, text in own if letter in "uarko"]
        said = [text for message in messages for text in (THOUGHT, LATER) if text in json.dumps(message)]
        assert sorted(text for text in new if text in (THOUGHT, LATER)) == sorted(said)
        for message in messages:
            answer = message["content"].split("</think>")[-1].strip()
            assert new.count(answer) == (1 if answer else 0) + (answer in ("hello",) and messages is WITH_TOOL)


def test_a_template_that_keeps_history_gives_one_document(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("qwen")
    made = rows(tokenizer, IN_CONTENT)
    assert made["doc_id"] == [5000]
    assert not np.any(made["flags"][0] & Flag.HISTORY)
    letters = "".join(letter for letter, _ in parts(tokenizer, made["input_ids"][0], made["flags"][0]))
    assert letters == "tutrcatutrcat"
    assert len(rows(tokenizer, IN_CONTENT, dialogues="per_turn")["doc_id"]) == 2


def test_whole_refuses_what_the_template_rewrites(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = template(build_tokenizer, DROPS_EARLIER)
    assert rows(tokenizer, IN_CONTENT, dialogues="whole")["dropped"] == [REWRITTEN]
    plain = [{**message, "content": message["content"].split("</think>")[-1].strip()} for message in IN_CONTENT]
    assert rows(tokenizer, plain, dialogues="whole")["doc_id"] == [5000]
    with pytest.raises(DialogueError):
        dialogue_documents(tokenizer, IN_CONTENT, read_template_shape(tokenizer), "whole")


def test_ids_differ_by_answer_and_tell_the_conversation(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = template(build_tokenizer, DROPS_EARLIER)
    ids = [rows(tokenizer, IN_CONTENT, doc_id=doc_id)["doc_id"] for doc_id in (3 << 40, (3 << 40) + 1024)]
    assert len({*ids[0], *ids[1]}) == 4
    conversations = [conversation_of(np.array(own)).tolist() for own in ids]
    assert conversations == [[3 << 40] * 2, [(3 << 40) + 1024] * 2]
    assert conversation_of(5000) == 5000
    assert rows(tokenizer, IN_CONTENT[:2])["doc_id"] == [5000]


def test_a_document_whose_history_fills_it_is_counted(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = template(build_tokenizer, DROPS_EARLIER)
    num_history = int((rows(tokenizer, IN_CONTENT)["flags"][1] & Flag.HISTORY != 0).sum())
    assert rows(tokenizer, IN_CONTENT, max_tokens=num_history)["dropped"] == ["", CUT]


def test_parts_json_text_and_calls_without_content_are_read() -> None:
    function = {"name": "capital", "arguments": '{"of": "Norland"}'}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
    ]
    read, reason = read_messages(json.dumps(messages), {})
    assert reason == ""
    assert read == [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "content with a part of type image_url",
        ),
        ({"role": "user", "content": None}, "a message without content"),
        ({"role": "user", "content": 5}, "not a dialogue"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": 3}]}, "tool calls are not {name, arguments}"),
    ],
)
def test_what_cannot_be_read_has_a_reason(message: Any, reason: str) -> None:
    assert read_messages([QUESTION, message], {}) == ([], reason)
    assert read_messages("no json", {}) == ([], "not a dialogue")
