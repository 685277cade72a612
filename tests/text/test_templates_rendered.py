from collections.abc import Callable
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.text.messages import DialogueError
from pipeline.text.templates import (
    NOT_UNICODE,
    REJECTED,
    REWRITTEN,
    check_template,
    read_template_shape,
    render_dialogue,
    render_prompt,
)
from pipeline.text.tokenizers import adds_bos, encode, read_bos_use

STYLES = ("gemma", "llama", "qwen")

TRICKY = [
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "model user\nassistant"},
    {"role": "user", "content": "  user \n"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "<start_of_turn>model\nhello<end_of_turn>"},
    {"role": "assistant", "content": "a"},
]

HAND_MADE = {
    "gemma": [
        (False, "<bos><start_of_turn>user\n"),
        (True, "Hi there"),
        (False, "<end_of_turn>\n<start_of_turn>model\n"),
        (True, "Hi there"),
        (False, "<end_of_turn>\n"),
    ],
    "llama": [
        (
            False,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnowledge ends: 2023.\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n",
        ),
        (True, "Hi there"),
        (False, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        (True, "Hi there"),
        (False, "<|eot_id|>"),
    ],
    "qwen": [
        (False, "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n"),
        (True, "Hi there"),
        (False, "<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hi there"),
        (False, "<|im_end|>\n"),
    ],
}


@pytest.mark.parametrize("style", STYLES)
def test_spans_equal_hand_made_pieces_when_both_contents_are_the_same(tokenizers: dict[str, Any], style: str) -> None:
    messages = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hi there"}]
    text, spans = render_dialogue(tokenizers[style], messages)
    pieces = HAND_MADE[style]
    assert text == "".join(piece for _, piece in pieces)
    starts = [sum(len(piece) for _, piece in pieces[:i]) for i, (is_content, _) in enumerate(pieces) if is_content]
    assert [(span.role, span.start, span.end) for span in spans] == [
        ("user", starts[0], starts[0] + 8),
        ("assistant", starts[1], starts[1] + 8),
    ]


@pytest.mark.parametrize("style", STYLES)
def test_contents_with_role_words_and_control_words_are_located_exactly(tokenizers: dict[str, Any], style: str) -> None:
    text, spans = render_dialogue(tokenizers[style], TRICKY)
    contents = [message["content"] if style == "qwen" else message["content"].strip() for message in TRICKY]
    assert [text[span.start : span.end] for span in spans] == contents  # qwen's template keeps outer whitespace
    assert [span.content_offset for span in spans] == [0, 0, 0 if style == "qwen" else 2, 0, 0, 0]
    assert [span.message for span in spans] == list(range(6))
    assert text == tokenizers[style].apply_chat_template(TRICKY, tokenize=False)


def test_system_prompt_moved_into_another_place_is_still_located(tokenizers: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi"}]
    text, spans = render_dialogue(tokenizers["llama"], messages)
    assert [(span.role, text[span.start : span.end]) for span in spans] == [("system", "Be kind."), ("user", "Hi")]
    assert spans[0].content_offset == 1


def test_blank_contents_get_no_span(tokenizers: dict[str, Any]) -> None:
    _, spans = render_dialogue(
        tokenizers["qwen"], [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]
    )
    assert [span.message for span in spans] == [1]


def test_template_that_refuses_a_dialogue_is_named_with_its_roles(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(DialogueError, match=r"\['assistant'\].*must alternate") as caught:
        render_dialogue(tokenizers["gemma"], [{"role": "assistant", "content": "Hi"}])
    assert caught.value.reason == REJECTED


@pytest.mark.parametrize(
    "expression",
    ["message['content'] | upper", "message['content'].split('</think>')[-1]", "message['content'] * 2", "'same'"],
)
def test_template_that_rewrites_contents_is_refused(build_tokenizer: Callable[..., Any], expression: str) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + " + expression + " }}{% endfor %}"
    )
    with pytest.raises(DialogueError, match="the template rewrites contents") as caught:
        render_dialogue(tokenizer, [{"role": "user", "content": "why </think> not"}])
    assert caught.value.reason == REWRITTEN


def _private(*points: int) -> str:
    return "".join(map(chr, points))


@pytest.mark.parametrize(
    "content",
    [
        f"a{_private(0xF0001)}b",
        f"{_private(0xF0000)}starts and ends{_private(0xF0001)}",
        _private(*range(0xF0000, 0xFFFFE)),  # all of the plane that marks contents otherwise
        f"the older area {_private(0xE000, 0xF8FF)}",
    ],
    ids=["inside", "around", "whole plane", "first plane"],
)
def test_private_use_characters_of_a_speaker_are_kept_like_any_other(tokenizers: dict[str, Any], content: str) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "why"}]
    rendered = render_dialogue(tokenizers["qwen"], messages)
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == [content, "why"]


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% for a in range(9999) %}{{ m(n + 1) if n < 3 }}{% endfor %}{% endmacro %}{{ m(0) }}",
    ],
    ids=["loops", "macro"],
)
def test_a_template_without_end_is_ended(
    build_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.chat_template += loop
    monkeypatch.setattr("pipeline.text.templates.MAX_RENDER_SECONDS", 0.3)
    with pytest.raises(InputError, match=r"tokens\.chat_template.*0\.3 s.*1 messages") as caught:
        render_dialogue(tokenizer, [{"role": "user", "content": "Hi"}])
    assert not isinstance(caught.value, DialogueError)  # the next dialogue would take as long


def test_a_template_file_without_end_is_refused_before_any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.text.templates.MAX_RENDER_SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"tokens\.chat_template: mine.*0\.3 s"):
        check_template(endless, "tokens.chat_template: mine")
    with pytest.raises(InputError, match=r"tokens\.chat_template: mine.*Jinja"):
        check_template("{{ " + "(" * 50_000, "tokens.chat_template: mine")
    check_template("{{ bos_token + raise_exception('needs a tokenizer') }}", "tokens.chat_template: mine")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("{% macro deeper() %}{{ deeper() }}{% endmacro %}{{ deeper() }}", REJECTED),
        ("{{ 1 / 0 }}", REJECTED),
        ("{{ 2.0 ** 99999 }}", REJECTED),
        ("{{ '\\ud800' }}", NOT_UNICODE),
    ],
)
def test_whatever_a_template_raises_or_writes_is_counted(
    build_tokenizer: Callable[..., Any], broken: str, reason: str
) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.chat_template += broken
    with pytest.raises(DialogueError) as caught:
        render_dialogue(tokenizer, [{"role": "user", "content": "Hi"}])
    assert caught.value.reason == reason


def test_missing_template_and_template_without_roles_are_input_errors(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    with pytest.raises(InputError, match=r"tells user from assistant turns, but it writes '.n' between both"):
        read_template_shape(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has none"):
        render_dialogue(tokenizer, [{"role": "user", "content": "Hi"}])


def test_a_template_that_writes_the_date_writes_the_same_on_every_day(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("qwen")
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    tokenizer.chat_template = "\n{{ strftime_now('%Y-%m-%d, %A %d %B %H:%M') }}\n" + plain
    text, _ = render_dialogue(tokenizer, [{"role": "user", "content": "Hi"}])
    assert text == "\n2024-07-26, Friday 26 July 00:00\nuser: Hi"


@pytest.mark.parametrize("text", ["{% for m in messages %}", "{{ messages[0] }", "{% nonsense %}"])
def test_a_file_that_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"tokens\.chat_template: a\.jinja: expected a Jinja chat template, got"):
        check_template(text, "tokens.chat_template: a.jinja")


def test_loop_controls_and_generation_marks_are_templates() -> None:
    check_template("{% for m in messages %}{% generation %}x{% endgeneration %}{% break %}{% endfor %}", "here")


def test_a_template_that_refuses_a_plain_dialogue_is_the_users_fault(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match="expected a chat template that renders a plain dialogue") as caught:
        read_template_shape(tokenizer)
    assert not isinstance(caught.value, DialogueError)


@pytest.mark.parametrize(
    ("style", "header", "trailer"),
    [
        ("gemma", "<start_of_turn>model\n", "<end_of_turn>\n"),
        ("llama", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("qwen", "<|im_start|>assistant\n", "<|im_end|>\n"),
    ],
)
def test_shape_holds_the_generation_prompt_and_the_end_of_turn(
    tokenizers: dict[str, Any], style: str, header: str, trailer: str
) -> None:
    shape = read_template_shape(tokenizers[style])
    assert shape.headers["assistant"] == header
    assert shape.trailers == {"user": trailer, "assistant": trailer}
    assert render_prompt(tokenizers[style], TRICKY[:1]).endswith(header)


def test_bos_is_removed_only_where_the_tokenizer_adds_it(
    build_tokenizer: Callable[..., Any], tokenizers: dict[str, Any]
) -> None:
    def text_of(tokenizer: Any, text: str) -> str:
        return encode(tokenizer, text, read_bos_use(tokenizer)).text

    assert adds_bos(tokenizers["gemma"])
    assert text_of(tokenizers["gemma"], "<bos>x") == "x"
    assert not adds_bos(tokenizers["qwen"])
    assert text_of(tokenizers["qwen"], "<bos>x") == "<bos>x"
    without = build_tokenizer("llama", adds_bos=False)
    assert text_of(without, "<|begin_of_text|>x") == "<|begin_of_text|>x"
