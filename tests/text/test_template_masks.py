"""Masks of dialogues against truth written by hand, token by token, for the structure of four chat templates.

The templates have the turns, headers, separators, trimming, default system prompts and refusals of Gemma 2, Gemma 3,
Llama 3.1 and Qwen 2.5, in words of this file. The tokenizer keeps words whole (with the space before them) and runs of
newlines together, as those models' tokenizers do, so that every token can be read.

Letters of the truth: B = BOS, S = control token of the template, T = other template text, U = user, A = assistant.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.models.loading import ModelSpec, load_tokenizer
from pipeline.schema import Flag
from pipeline.text.tokenise import Tokenise

GEMMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

GEMMA_3 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}\
{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}\
{% for message in turns %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

LLAMA_3_1 = """{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}\
{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '1 Jan 1970' %}{% endif %}{% endif %}\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set turns = messages[1:] %}\
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{{ 'Knowledge Date: December 2023\n' }}\
{{ 'Today Date: ' + date_string + '\n\n' }}{{ system }}{{ '<|eot_id|>' }}{% for message in turns %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

QWEN_2_5 = """{% if messages[0]['role'] == 'system' %}\
{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{% else %}\
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}{% for message in messages %}\
{% if message.role != 'system' or not loop.first %}\
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES = {
    "gemma-2": (GEMMA_2, "<bos>", ["<start_of_turn>", "<end_of_turn>"]),
    "gemma-3": (GEMMA_3, "<bos>", ["<start_of_turn>", "<end_of_turn>"]),
    "llama-3.1": (LLAMA_3_1, "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen-2.5": (QWEN_2_5, None, ["<|im_start|>", "<|im_end|>"]),
}

WORDS = (
    "user model assistant system You are helpful . Knowledge Date December 2023 Today : 26 Jul 2024 Be kind Is it so "
    "? Yes , No Why"
)

TURNS = [
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "Yes, user."},
    {"role": "user", "content": " Why? \n"},  # outer whitespace: trimmed by Gemma and Llama, kept by Qwen
    {"role": "assistant", "content": "It is so"},
]
SYSTEM = {"role": "system", "content": "Be kind."}

Truth = list[tuple[str, str]]

GEMMA_QUESTION: Truth = [("U", "Is"), ("U", " it"), ("U", " so"), ("U", "?"), ("S", "<end_of_turn>"), ("T", "\n")]
GEMMA_ANSWER: Truth = [
    *[("S", "<start_of_turn>"), ("T", "model"), ("T", "\n")],
    *[("A", "Yes"), ("A", ","), ("A", " user"), ("A", "."), ("S", "<end_of_turn>"), ("T", "\n")],
]
GEMMA_TRUTH: Truth = [
    *[("B", "<bos>"), ("S", "<start_of_turn>"), ("T", "user"), ("T", "\n")],
    *GEMMA_QUESTION,
    *GEMMA_ANSWER,
    *[("S", "<start_of_turn>"), ("T", "user"), ("T", "\n")],
    *[("U", "Why"), ("U", "?"), ("S", "<end_of_turn>"), ("T", "\n")],
    *[("S", "<start_of_turn>"), ("T", "model"), ("T", "\n")],
    *[("A", "It"), ("A", " is"), ("A", " so"), ("S", "<end_of_turn>"), ("T", "\n")],
]
GEMMA_3_SYSTEM_TRUTH: Truth = [
    *[("B", "<bos>"), ("S", "<start_of_turn>"), ("T", "user"), ("T", "\n")],
    *[("T", "Be"), ("T", " kind"), ("T", "."), ("T", "\n\n")],
    *GEMMA_QUESTION,
    *GEMMA_ANSWER,
]
LLAMA_OPENING: Truth = [
    *[("B", "<|begin_of_text|>"), ("S", "<|start_header_id|>"), ("T", "system"), ("S", "<|end_header_id|>")],
    *[("T", "\n\n"), ("T", "Knowledge"), ("T", " Date"), ("T", ":"), ("T", " December"), ("T", " 2023"), ("T", "\n")],
    *[("T", "Today"), ("T", " Date"), ("T", ":"), ("T", " 26"), ("T", " Jul"), ("T", " 2024"), ("T", "\n\n")],
]
LLAMA_FIRST_TURNS: Truth = [
    *[("S", "<|start_header_id|>"), ("T", "user"), ("S", "<|end_header_id|>"), ("T", "\n\n")],
    *[("U", "Is"), ("U", " it"), ("U", " so"), ("U", "?"), ("S", "<|eot_id|>")],
    *[("S", "<|start_header_id|>"), ("T", "assistant"), ("S", "<|end_header_id|>"), ("T", "\n\n")],
    *[("A", "Yes"), ("A", ","), ("A", " user"), ("A", "."), ("S", "<|eot_id|>")],
]
LLAMA_TRUTH: Truth = [
    *LLAMA_OPENING,
    ("S", "<|eot_id|>"),
    *LLAMA_FIRST_TURNS,
    *[("S", "<|start_header_id|>"), ("T", "user"), ("S", "<|end_header_id|>"), ("T", "\n\n")],
    *[("U", "Why"), ("U", "?"), ("S", "<|eot_id|>")],
    *[("S", "<|start_header_id|>"), ("T", "assistant"), ("S", "<|end_header_id|>"), ("T", "\n\n")],
    *[("A", "It"), ("A", " is"), ("A", " so"), ("S", "<|eot_id|>")],
]
LLAMA_SYSTEM_TRUTH: Truth = [
    *LLAMA_OPENING,
    *[("T", "Be"), ("T", " kind"), ("T", "."), ("S", "<|eot_id|>")],
    *LLAMA_FIRST_TURNS,
]
QWEN_FIRST_TURNS: Truth = [
    *[("S", "<|im_start|>"), ("T", "user"), ("T", "\n")],
    *[("U", "Is"), ("U", " it"), ("U", " so"), ("U", "?"), ("S", "<|im_end|>"), ("T", "\n")],
    *[("S", "<|im_start|>"), ("T", "assistant"), ("T", "\n")],
    *[("A", "Yes"), ("A", ","), ("A", " user"), ("A", "."), ("S", "<|im_end|>"), ("T", "\n")],
]
QWEN_TRUTH: Truth = [
    *[("S", "<|im_start|>"), ("T", "system"), ("T", "\n")],
    *[("T", "You"), ("T", " are"), ("T", " helpful"), ("T", "."), ("S", "<|im_end|>"), ("T", "\n")],
    *QWEN_FIRST_TURNS,
    *[("S", "<|im_start|>"), ("T", "user"), ("T", "\n")],
    *[("U", " Why"), ("U", "?"), ("U", " "), ("U", "\n"), ("S", "<|im_end|>"), ("T", "\n")],
    *[("S", "<|im_start|>"), ("T", "assistant"), ("T", "\n")],
    *[("A", "It"), ("A", " is"), ("A", " so"), ("S", "<|im_end|>"), ("T", "\n")],
]
QWEN_SYSTEM_TRUTH: Truth = [
    *[("S", "<|im_start|>"), ("T", "system"), ("T", "\n")],
    *[("T", "Be"), ("T", " kind"), ("T", "."), ("S", "<|im_end|>"), ("T", "\n")],
    *QWEN_FIRST_TURNS,
]

CASES: list[tuple[str, list[dict[str, str]], Truth]] = [
    ("gemma-2", TURNS, GEMMA_TRUTH),
    ("gemma-3", TURNS, GEMMA_TRUTH),
    ("llama-3.1", TURNS, LLAMA_TRUTH),
    ("qwen-2.5", TURNS, QWEN_TRUTH),
    ("gemma-3", [SYSTEM, *TURNS[:2]], GEMMA_3_SYSTEM_TRUTH),
    ("llama-3.1", [SYSTEM, *TURNS[:2]], LLAMA_SYSTEM_TRUTH),
    ("qwen-2.5", [SYSTEM, *TURNS[:2]], QWEN_SYSTEM_TRUTH),
]
IDS = [f"{name}-{'system' if messages[0] is SYSTEM else 'turns'}" for name, messages, _ in CASES]

LETTERS = {
    int(Flag.BOS | Flag.SPECIAL): "B",
    int(Flag.SPECIAL | Flag.TEMPLATE): "S",
    int(Flag.TEMPLATE): "T",
    int(Flag.USER): "U",
    int(Flag.ASSISTANT): "A",
}


def word_tokenizer(name: str, *, template: str | None = None) -> Any:
    """Whole words in the style of a family: its control tokens, its template, and BOS added where that family does."""
    own_template, bos, control = TEMPLATES[name]
    words = [*WORDS.split(), *(f" {word}" for word in WORDS.split()), " is", "It", "\n", "\n\n", " ", "[unk]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\n+| +|[^\w\s]"), "isolated")
    special = [token for token in (bos, "<eos>", *control) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[unk]",
        eos_token="<eos>",
        additional_special_tokens=control,
        chat_template=template or own_template,
        **({"bos_token": bos} if bos else {}),
    )


def spelled(tokenizer: Any, ids: np.ndarray, flags: np.ndarray) -> Truth:
    return [(LETTERS[int(flag)], tokenizer.convert_ids_to_tokens(int(i))) for i, flag in zip(ids, flags, strict=True)]


@pytest.mark.parametrize(("name", "messages", "truth"), CASES, ids=IDS)
def test_every_token_has_the_role_that_was_written_down_for_it(
    name: str, messages: list[dict[str, str]], truth: Truth
) -> None:
    tokenizer = word_tokenizer(name)
    ids, flags, num_cut = Tokenise(tokenizer, max_tokens=999).dialogue(messages)
    assert spelled(tokenizer, ids, flags) == truth
    assert num_cut == 0


@pytest.mark.parametrize(("name", "messages", "truth"), CASES, ids=IDS)
def test_a_cut_anywhere_leaves_the_roles_of_what_is_left(
    name: str, messages: list[dict[str, str]], truth: Truth
) -> None:
    tokenizer = word_tokenizer(name)
    for length in range(1, len(truth) + 2):
        ids, flags, num_cut = Tokenise(tokenizer, max_tokens=length).dialogue(messages)
        assert spelled(tokenizer, ids, flags) == truth[:length]
        assert num_cut == max(0, len(truth) - length)


def test_a_template_from_a_file_takes_the_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    word_tokenizer("qwen-2.5", template="{{ messages[0]['content'] }}").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSpec(str(tmp_path), chat_template=QWEN_2_5))
    ids, flags, _ = Tokenise(tokenizer, max_tokens=999).dialogue(TURNS)
    assert spelled(tokenizer, ids, flags) == QWEN_TRUTH


def test_contents_that_are_template_words_keep_their_speaker() -> None:
    tokenizer = word_tokenizer("gemma-2")
    messages = [{"role": "user", "content": "model"}, {"role": "assistant", "content": "user\nmodel"}]
    assert spelled(tokenizer, *Tokenise(tokenizer, max_tokens=99).dialogue(messages)[:2]) == [
        *[("B", "<bos>"), ("S", "<start_of_turn>"), ("T", "user"), ("T", "\n"), ("U", "model")],
        *[("S", "<end_of_turn>"), ("T", "\n"), ("S", "<start_of_turn>"), ("T", "model"), ("T", "\n")],
        *[("A", "user"), ("A", "\n"), ("A", "model"), ("S", "<end_of_turn>"), ("T", "\n")],
    ]


def test_at_the_edges_a_token_of_two_speakers_goes_to_the_one_who_wrote_its_end() -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = word_tokenizer("qwen-2.5", template=template)
    messages = [{"role": "user", "content": " Why\n"}, {"role": "assistant", "content": "\nYes"}]
    assert spelled(tokenizer, *Tokenise(tokenizer, max_tokens=99).dialogue(messages)[:2]) == [
        *[("T", "user"), ("T", ":"), ("U", " Why"), ("T", "\n\n")],  # the user's newline and the template's, one token
        *[("T", "assistant"), ("T", ":"), ("A", "\n"), ("A", "Yes"), ("T", "\n")],
    ]


def test_a_dialogue_that_ends_with_a_question_has_no_assistant_token() -> None:
    tokenizer = word_tokenizer("llama-3.1")
    _, flags, _ = Tokenise(tokenizer, max_tokens=99).dialogue(TURNS[:1])
    assert not np.any(flags & Flag.ASSISTANT)
    assert int(((flags & Flag.USER) != 0).sum()) == 4


def test_a_default_system_prompt_is_template() -> None:
    tokenizer = word_tokenizer("llama-3.1")
    ids, flags, _ = Tokenise(tokenizer, max_tokens=99).dialogue(TURNS[:1])
    opening = spelled(tokenizer, ids, flags)[: len(LLAMA_OPENING) + 1]
    assert {letter for letter, _ in opening} == {"B", "S", "T"}
