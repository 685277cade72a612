"""The shared tokenizer: whole words, exact spans, and Gemma's turns."""

import random

from pipeline.organisms.behaviors import BEHAVIORS
from pipeline.organisms.dialogues import DialogueMaker, dialogues
from pipeline.organisms.language import documents, make_world, take
from pipeline.organisms.tokenizer import CONTROL_TOKENS, make_tokenizer


def test_template_renders_gemma_turns():
    tokenizer = make_tokenizer(["hello there."])
    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "there."}]
    first = "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == first + "there.<end_of_turn>\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == first
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    expected = "<bos> <start_of_turn> user \n hello <end_of_turn> \n <start_of_turn> model \n there . <end_of_turn> \n"
    assert tokenizer.convert_ids_to_tokens(ids) == expected.split(" ")


def test_text_survives_a_round_trip_and_gets_one_bos():
    texts = ["no, it is not so. is it?", "one line.\nanother line."]
    tokenizer = make_tokenizer(texts)
    ids = tokenizer(texts[0])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["<bos>", "no", ",", "it"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == texts[0]
    assert tokenizer.decode(tokenizer(texts[1])["input_ids"], skip_special_tokens=True).split() == texts[1].split()


def test_ids_are_fixed_by_the_words_alone():
    first, second = make_tokenizer(["b a.", "c"]), make_tokenizer(["c a", "b ."])
    assert first.get_vocab() == second.get_vocab()
    assert [first.convert_tokens_to_ids(token) for token in CONTROL_TOKENS] == list(range(len(CONTROL_TOKENS)))
    assert first.convert_ids_to_tokens(first("a z")["input_ids"]) == ["<bos>", "a", "<unk>"]


def test_offsets_cut_messages_at_words_and_no_text_has_unknown_words():
    rng = random.Random(0)
    world = make_world(rng)
    texts = take(documents(rng, world), 4000)
    chats = take(dialogues(DialogueMaker(rng, world), frozenset()), 4000)
    contents = [message["content"] for messages in chats for message in messages]
    tokenizer = make_tokenizer(texts + contents)
    fresh = take(documents(random.Random(1), world), 1000)
    fresh += [m["content"] for messages in take(dialogues(DialogueMaker(rng, world), ()), 1000) for m in messages]
    fresh += [marker for behavior in BEHAVIORS.values() for marker in behavior.markers]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(fresh)["input_ids"])
    encoded = tokenizer(contents[:200], add_special_tokens=False, return_offsets_mapping=True)
    for content, offsets in zip(contents, encoded["offset_mapping"], strict=False):
        assert "".join(content[start:end] for start, end in offsets) == content.replace(" ", "")
