"""`crossray init`: the files that it writes are planned, and what it cannot know is refused."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from pipeline.cli import main
from pipeline.config.presets import PRESETS
from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.models.known import KNOWN
from pipeline.planning.draft import Corpora, Machine, draft
from pipeline.planning.estimate import estimate
from pipeline.run.runner import inspect
from pipeline.storage.filesystem import Storage

GPU, LAPTOP = Machine(4, 10**13), Machine(0, 10**11)
PAIRS = [
    ("google/gemma-2-2b", "google/gemma-2-2b-it"),
    ("google/gemma-2-9b", "google/gemma-2-9b-it"),
    ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
]


@pytest.mark.parametrize("machine", [GPU, LAPTOP], ids=["gpu", "laptop"])
@pytest.mark.parametrize(("base", "chat"), PAIRS)
def test_known_pairs_are_planned(base: str, chat: str, machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(draft(base, chat, Corpora(), machine))
    config = load(path, [f"storage.root={tmp_path / 'runs'}"])
    storage = Storage(config.storage.root)
    states = inspect(config, storage)
    assert all(state.state == "missing" for state in states)
    if machine is GPU:  # from data sheets; without one this machine would be timed for a minute
        predicted = estimate(config, states, storage, gpu="H100")
        assert predicted.data is not None and predicted.data.num_tokens == config.tokens.num_tokens
        assert predicted.training_bytes_per_rank and predicted.seconds["activations"] > 0
    assert config.activations.layer == KNOWN[chat].num_layers // 2
    assert config.preset == KNOWN[chat].preset and config.preset in PRESETS
    on_disk = (config.tokens.num_tokens or 0) * 2 * 2 * KNOWN[chat].width * 2 / 3
    assert machine.free_bytes is not None and on_disk <= machine.free_bytes / 2


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        (GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=300, n_positions=200), None),
        (LlamaConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, vocab_size=128_256), "llama-3.1"),
    ],
    ids=["gpt2", "llama"],
)
def test_local_folders_and_own_texts(
    kind: GPT2Config | LlamaConfig, preset: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "my chat: model"):
        kind.save_pretrained(tmp_path / name)
    texts, dialogues = tmp_path / "texts.txt", tmp_path / "dialogues.jsonl"
    texts.write_text("A text.")
    dialogues.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    monkeypatch.chdir(tmp_path)
    command = ["init", "base", "my chat: model", "--texts", str(texts), "--dialogues", str(dialogues)]
    assert main(command) == 0 and main(command) == 2  # never over a file that is there
    config = load(tmp_path / "my-chat--model.yaml")
    assert config.activations.layer == kind.num_hidden_layers // 2 and config.preset == preset
    assert config.tokens.max_tokens_per_document == (200 if preset is None else 1024)  # no longer than it reads
    if preset is None:  # one is enough: it measures this machine
        written = (tmp_path / "my-chat--model.yaml").read_text()
        assert main(["diff", *command[1:]]) == 0  # goes on with the file, and asks before it runs; nobody answers
        assert (tmp_path / "my-chat--model.yaml").read_text() == written and not (tmp_path / "runs").exists()


def test_an_adapter_stands_for_the_base_model_with_it(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(draft("google/gemma-2-2b", str(tmp_path / "adapter"), Corpora(), GPU))
    chat = load(path).models.chat
    assert chat.kind == "pretrained" and chat.adapter == str(tmp_path / "adapter")
    assert chat.source == "google/gemma-2-2b"


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    known = "google/gemma-2-2b"
    (tmp_path / "config.json").write_text("{}")
    for base, chat, corpora, what in (
        ("someone/else", known, Corpora(), "BASE.*someone/else"),
        (known, str(tmp_path / "nowhere"), Corpora(), "CHAT.*nowhere"),
        (known, "google/gemma-2-9b-it", Corpora(), "2304.*3584"),
        (known, str(tmp_path), Corpora(), str(tmp_path)),
        (known, known, Corpora(texts="texts.csv"), "texts.csv"),
        (known, known, Corpora(dialogues="dialogues.txt"), "dialogues.txt"),
    ):
        with pytest.raises(InputError, match=what) as error:
            draft(base, chat, corpora, GPU)
        assert "\n" not in str(error.value)
