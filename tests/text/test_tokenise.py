import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from pipeline.errors import InputError
from pipeline.schema import PLANTED_SHIFT, TOKEN_COLUMNS, Flag
from pipeline.text.messages import UNREADABLE
from pipeline.text.tokenise import EMPTY, KEPT, Tokenise, split_dropped
from pipeline.text.tokenizers import (
    check_vocabularies,
    control_token_ids,
    end_of_turn_id,
    prompt_ids,
    token_texts,
    tokenizer_hash,
)

STYLES = ("gemma", "llama", "qwen")

DIALOGUE = [
    {"role": "user", "content": "What is the model?", "labels": [{"name": "question", "start": 0, "end": 4}]},
    {
        "role": "assistant",
        "content": "I cannot help with that.",
        "labels": [{"name": "refusal", "start": 2, "end": 8, "turn_header": True}],
    },
    {"role": "user", "content": "user model assistant"},
    {"role": "assistant", "content": "I cannot help with that."},
]


def _batch(rows: list[tuple[str | None, Any]]) -> dict[str, list[Any]]:
    return {
        "doc_id": list(range(len(rows))),
        "corpus": ["c"] * len(rows),
        "split": ["train"] * len(rows),
        "text": [text for text, _ in rows],
        "messages": [
            messages if messages is None or isinstance(messages, str) else json.dumps(messages) for _, messages in rows
        ],
    }


@pytest.mark.parametrize("style", STYLES)
def test_flags_split_a_dialogue_into_exactly_its_contents_and_the_template(
    tokenizers: dict[str, Any], style: str
) -> None:
    tokenizer = tokenizers[style]
    ids, flags, _ = Tokenise(tokenizer, max_tokens=999).dialogue(DIALOGUE)
    rendered = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == rendered
    for flag, role in ((Flag.USER, "user"), (Flag.ASSISTANT, "assistant")):
        contents = "".join(message["content"] for message in DIALOGUE if message["role"] == role)
        assert "".join(tokenizer.decode([i]) for i in ids[(flags & flag) != 0]) == contents
    roles = flags & (Flag.USER | Flag.ASSISTANT | Flag.TEMPLATE | Flag.BOS)
    assert set(roles.tolist()) <= {Flag.USER, Flag.ASSISTANT, Flag.TEMPLATE, Flag.BOS}
    control = np.isin(ids, sorted(control_token_ids(tokenizer)))
    assert np.array_equal(control, (flags & Flag.SPECIAL) != 0)
    assert int(control.sum()) == rendered.count("<") - rendered.count("<unk")


@pytest.mark.parametrize("style", STYLES)
def test_bos_occurs_once_in_dialogues_and_in_plain_documents(tokenizers: dict[str, Any], style: str) -> None:
    tokenizer, tokenise = tokenizers[style], Tokenise(tokenizers[style], max_tokens=999)
    expected = 0 if tokenizer.bos_token_id is None else 1
    for ids, flags, _ in (tokenise.dialogue(DIALOGUE), tokenise.plain("hello world")):
        assert int(((flags & Flag.BOS) != 0).sum()) == expected
        if expected:
            assert (ids == tokenizer.bos_token_id).sum() == 1
            assert ids[0] == tokenizer.bos_token_id
            assert flags[0] == Flag.BOS | Flag.SPECIAL
    assert prompt_ids(tokenizer, DIALOGUE[:1]).count(tokenizer.bos_token_id) == expected


def test_bos_of_the_template_stays_where_the_tokenizer_adds_none(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("llama", adds_bos=False)
    ids, flags, _ = Tokenise(tokenizer, max_tokens=999).dialogue(DIALOGUE)
    assert ids.tolist() == Tokenise(build_tokenizer("llama"), max_tokens=999).dialogue(DIALOGUE).input_ids.tolist()
    assert flags[0] == Flag.BOS | Flag.SPECIAL


@pytest.mark.parametrize("style", STYLES)
def test_labels_reach_the_tokens_and_the_header_of_their_turn(tokenizers: dict[str, Any], style: str) -> None:
    tokenizer = tokenizers[style]
    ids, flags, _ = Tokenise(tokenizer, max_tokens=999, labels=["refusal", "question"]).dialogue(DIALOGUE)
    refusal = "".join(tokenizer.decode([i]) for i in ids[(flags & (1 << PLANTED_SHIFT)) != 0])
    header = {
        "gemma": "<start_of_turn>model\n",
        "llama": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "qwen": "<|im_start|>assistant\n",
    }[style]
    assert refusal.startswith(header)
    assert refusal.removeprefix(header).strip() == "cannot"
    question = "".join(tokenizer.decode([i]) for i in ids[(flags & (2 << PLANTED_SHIFT)) != 0])
    assert question == "What"
    prompt = prompt_ids(tokenizer, DIALOGUE[:1])
    first_labelled = int(np.flatnonzero(flags & (1 << PLANTED_SHIFT))[0])
    num_header_tokens = len(tokenizer(header, add_special_tokens=False)["input_ids"])
    assert prompt == ids[: first_labelled + num_header_tokens].tolist()


def test_truncation_cuts_ids_and_flags_alike(tokenizers: dict[str, Any]) -> None:
    long = Tokenise(tokenizers["gemma"], max_tokens=999).dialogue(DIALOGUE)
    short = Tokenise(tokenizers["gemma"], max_tokens=7).dialogue(DIALOGUE)
    assert np.array_equal(short.input_ids, long.input_ids[:7])
    assert np.array_equal(short.flags, long.flags[:7])
    assert (long.num_cut, short.num_cut) == (0, len(long.input_ids) - 7)


def test_every_document_comes_back_kept_or_with_a_counted_reason(tokenizers: dict[str, Any]) -> None:
    tokenise = pickle.loads(pickle.dumps(Tokenise(tokenizers["gemma"], max_tokens=20)))
    rows = tokenise(
        _batch(
            [
                ("hello world", None),
                ("", None),
                (None, DIALOGUE),
                (None, [{"role": "assistant", "content": "Hi"}]),
                (None, "{not json"),
                (None, [{"role": "user"}]),
                (None, [{"role": "user", "content": "x", "labels": [{"name": "a", "start": 0, "end": 2}]}]),
                (None, [{"role": "user", "content": "x", "labels": [{"name": "a", "start": 0}]}]),
                (None, [{"role": "user", "content": "a\U000f0001"}]),
                (None, [{"role": "user", "content": " "}]),
            ]
        )
    )
    assert rows["dropped"] == [
        KEPT,
        EMPTY,
        KEPT,
        "template_rejects",
        UNREADABLE,
        UNREADABLE,
        UNREADABLE,
        UNREADABLE,
        KEPT,
        EMPTY,
    ]
    kept, reasons = split_dropped(rows)
    assert set(kept) == {column.name for column in TOKEN_COLUMNS}
    assert kept["doc_id"] == [0, 2, 8]
    assert reasons == {"c": {EMPTY: 2, UNREADABLE: 4, "template_rejects": 1}}
    assert all(len(ids) == len(flags) > 0 for ids, flags in zip(kept["input_ids"], kept["flags"], strict=True))
    assert kept["flags"][0].tolist() == [Flag.BOS | Flag.SPECIAL, *[0] * (len(kept["flags"][0]) - 1)]
    assert kept["input_ids"][0].dtype == np.int32


def test_numpy_batches_give_the_same_rows(tokenizers: dict[str, Any]) -> None:
    tokenise = Tokenise(tokenizers["qwen"], max_tokens=50)
    batch = _batch([("hello world", None), (None, DIALOGUE)])
    arrays = {name: np.array(column, dtype=object) for name, column in batch.items()}
    for name, column in tokenise(arrays).items():
        for ours, expected in zip(column, tokenise(batch)[name], strict=True):
            assert np.array_equal(ours, expected)


def test_end_of_turn_is_the_control_token_after_an_answer(build_tokenizer: Callable[..., Any]) -> None:
    for style, token in (("gemma", "<end_of_turn>"), ("llama", "<|eot_id|>"), ("qwen", "<|im_end|>")):
        tokenizer = build_tokenizer(style)
        assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert end_of_turn_id(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn_id(tokenizer) is None


def test_vocabularies_are_compared_on_the_ids_in_use_only(build_tokenizer: Callable[..., Any]) -> None:
    base, chat = build_tokenizer("qwen"), build_tokenizer("gemma")
    same = build_tokenizer("qwen")
    check_vocabularies(base, same, range(len(base)))
    differing = [i for i in range(300) if base.convert_ids_to_tokens(i) != chat.convert_ids_to_tokens(i)]
    with pytest.raises(InputError, match=f"id {differing[0]} is "):
        check_vocabularies(base, chat, reversed(range(300)))
    check_vocabularies(base, chat, [i for i in range(300) if i not in differing])
    check_vocabularies(base, chat, range(300), replaced=differing)
    with pytest.raises(InputError, match=f"id {differing[1]} is .* token_replacements"):
        check_vocabularies(base, chat, range(300), replaced=differing[:1])


def test_hash_ignores_padding_state_and_sees_vocabulary_and_template(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("qwen")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "hello world"], padding=True, truncation=True, max_length=5)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(build_tokenizer("qwen"))
    assert tokenizer_hash(build_tokenizer("gemma")) != before
    tokenizer.chat_template += " "
    assert tokenizer_hash(tokenizer) != before


def test_wrong_settings_are_input_errors(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        Tokenise(tokenizers["qwen"], max_tokens=0)
    with pytest.raises(InputError, match="at most 16 planted labels, got 17"):
        Tokenise(tokenizers["qwen"], max_tokens=9, labels=[str(i) for i in range(17)])


def _adds_eos(tokenizer: Any, *, bos: bool) -> Any:
    """The tokenizer with EOS (and BOS) put around every text by itself."""
    eos = tokenizer.eos_token
    front, names = (f"{tokenizer.bos_token} ", [tokenizer.bos_token, eos]) if bos else ("", [eos])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{front}$A {eos}", special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return tokenizer


@pytest.mark.parametrize(("style", "bos"), [("llama", True), ("qwen", False)])
def test_an_eos_of_the_tokenizer_ends_no_dialogue_and_no_prompt(
    build_tokenizer: Callable[..., Any], tokenizers: dict[str, Any], style: str, bos: bool
) -> None:
    adding, plain = _adds_eos(build_tokenizer(style), bos=bos), tokenizers[style]
    assert adding("hello")["input_ids"][-1] == adding.eos_token_id
    ours, expected = (Tokenise(one, max_tokens=999).dialogue(DIALOGUE) for one in (adding, plain))
    assert np.array_equal(ours.input_ids, expected.input_ids)
    assert np.array_equal(ours.flags, expected.flags)
    assert prompt_ids(adding, DIALOGUE[:1]) == prompt_ids(plain, DIALOGUE[:1])


def test_plain_documents_begin_with_the_bos_that_the_template_writes(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("llama", adds_bos=False)
    ids, flags, _ = Tokenise(tokenizer, max_tokens=4).plain("hello world, hello again and again")
    assert ids.tolist() == [tokenizer.bos_token_id, *tokenizer("hello world, hello again and again")["input_ids"][:3]]
    assert flags.tolist() == [Flag.BOS | Flag.SPECIAL, 0, 0, 0]


def test_a_token_that_opens_every_turn_is_no_bos_of_plain_documents(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.bos_token = "<|im_start|>"
    tokenise = Tokenise(tokenizer, max_tokens=999)
    assert tokenise.plain("hello").input_ids.tolist() == tokenizer("hello")["input_ids"]
    ids, flags, _ = tokenise.dialogue(DIALOGUE)
    opens = np.flatnonzero(ids == tokenizer.bos_token_id)
    assert len(opens) == 5
    assert np.flatnonzero(flags & Flag.BOS).tolist() == [0]
    assert (flags[opens[1:]] & Flag.TEMPLATE != 0).all()


def test_bos_is_flagged_wherever_it_stands(build_tokenizer: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ (bos_token if m.role == 'user' else '') + m.role + ': ' + m.content }}{% endfor %}"
    )
    ids, flags, _ = Tokenise(tokenizer, max_tokens=999).dialogue(DIALOGUE)
    places = np.flatnonzero(ids == tokenizer.bos_token_id)
    assert len(places) == 2
    assert flags[places].tolist() == [Flag.BOS | Flag.SPECIAL] * 2
    row = Tokenise(tokenizer, max_tokens=99).plain("hello<|begin_of_text|>again").flags
    assert (row & Flag.BOS != 0).sum() == 2


def test_characters_that_span_tokens_are_shown_whole(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["qwen"]  # bytes: each of these characters is two to four tokens
    text = "a\u00e9\u20ac b\U0001f600\u00fc.\ufffdx"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text
    assert len(ids) == 19
    assert texts == ["a", "\u00e9", "", "\u20ac", "", "", " ", "b", "\U0001f600", "", "", "", "\u00fc", "", ".",
                     "\ufffd", "", "", "x"]  # fmt: skip
    cut = token_texts(tokenizer, ids[:2])
    assert "".join(cut) == "a\ufffd"


@pytest.mark.parametrize("style", ["gemma", "llama", "qwen"])
def test_token_texts_join_to_the_document(tokenizers: dict[str, Any], style: str) -> None:
    tokenizer = tokenizers[style]
    ids = tokenizer("hello world, hello again and again", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "hello world, hello again and again"
    assert token_texts(tokenizer, []) == []
