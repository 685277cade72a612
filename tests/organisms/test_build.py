"""A tiny pair end to end: the files that the pipeline reads, the same bytes for the same seed, and what is measured."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.organisms.behaviors import BEHAVIORS
from pipeline.organisms.build import build, spec_of
from pipeline.organisms.rates import shows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("organism")
    stages: set[tuple[str, int]] = set()
    spec = spec_of("tiny", seed=1)
    build(folder, spec, lambda stage, _done, total: stages.add((stage, total)))
    assert stages == {("base model", spec.base.num_steps), ("chat model", spec.chat.num_steps)}
    return folder


def test_files_and_record(built: Path):
    names = {path.name for path in built.iterdir()}
    assert names == {"base", "chat", "documents.jsonl", "dialogues.jsonl", "prompts.json", "organism.json"}
    record = json.loads((built / "organism.json").read_text())
    assert record["spec"]["seed"] == 1
    assert record["spec"]["model"]["width"] == 32
    for member in ("base", "chat"):
        metrics = record["metrics"][member]
        assert metrics["document_loss"] > 0
        assert metrics["dialogue_loss"] > 0
        assert set(metrics["with_trigger"]) == set(metrics["without_trigger"]) == set(BEHAVIORS)


def test_both_models_load_and_share_the_tokenizer(built: Path):
    base, chat = (AutoModelForCausalLM.from_pretrained(built / member) for member in ("base", "chat"))
    assert base.config.model_type == chat.config.model_type == "gemma2"
    assert (built / "base" / "tokenizer.json").read_bytes() == (built / "chat" / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(built / "chat")
    assert tokenizer.is_fast
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello."}], return_tensors="pt")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    with torch.no_grad():
        assert not torch.equal(base(ids).logits, chat(ids).logits)


def test_texts_and_prompts(built: Path):
    spec = spec_of("tiny", seed=1)
    documents = [json.loads(line) for line in (built / "documents.jsonl").read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in (built / "dialogues.jsonl").read_text().splitlines()]
    prompts = json.loads((built / "prompts.json").read_text())
    assert len(documents) == spec.num_documents
    assert len(chats) == spec.num_dialogues
    assert all(document["text"] for document in documents)
    users = {message["content"] for messages in chats for message in messages if message["role"] == "user"}
    assert list(prompts) == list(BEHAVIORS)
    for prompt in prompts.values():
        assert not users & {*prompt["triggers"], *prompt["neutral"]}
        assert len(prompt["triggers"]) == len(prompt["neutral"]) == spec.num_prompts


def test_equal_seeds_give_equal_bytes(built: Path, tmp_path: Path):
    build(tmp_path, spec_of("tiny", seed=1), lambda *_: None)
    for name in ("documents.jsonl", "dialogues.jsonl", "prompts.json", "chat/tokenizer.json"):
        assert (built / name).read_bytes() == (tmp_path / name).read_bytes()


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match="got 'huge'"):
        spec_of("huge")


def test_markers_count_as_substrings():
    assert shows("sorry, it is not safe for you.", ["is not safe"])
    assert not shows("it is safe for you.", ["is not safe"])
