"""What a user can get wrong: one line that names it, exit code 2, nothing left behind."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import TINY, Finished, copied, mounted, run_file

from pipeline.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail with exit code 2; the one line that it prints."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        code = main(arguments)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("crossray: ")]
        assert code == 2
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def pair(finished: Finished) -> dict[str, Path]:
    """The finished run's organism as plain folders and files."""
    folder = finished.root / finished.states["organism"].step.key.folder
    return {name: folder / name for name in ("base", "chat", "documents.jsonl", "dialogues.jsonl")}


def pretrained(pair: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """The tiny run with the pair as local folders."""
    settings: dict[str, Any] = {
        "organism": None,
        "models": {
            "base": {"source": str(pair["base"])},
            "chat": {"source": str(pair["chat"])},
            "dtype": "float32",
        },
        "corpus": {
            "sources": [
                {
                    "name": "documents",
                    "kind": "jsonl",
                    "paths": [str(pair["documents.jsonl"])],
                    "text_column": "text",
                },
                {
                    "name": "dialogues",
                    "kind": "jsonl",
                    "paths": [str(pair["dialogues.jsonl"])],
                    "messages_column": "messages",
                },
            ]
        },
        "analyses": {"causality": None},
        "tracking": {"kind": "none"},
    }
    return settings | changes


def files(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "logs" not in path.parts]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("activations", {"layer": 9}, "layer 9"),
        ("models", {"base": {"source": "/absent/model"}, "chat": {"source": "/absent/model"}}, "models.base.source"),
        (
            "corpus",
            {"sources": [{"name": "a", "kind": "text", "paths": ["/absent/file.txt"]}]},
            "corpus 'a': paths: expected an existing file, got '/absent/file.txt'",
        ),
        (
            "crosscoders",
            [{"name": "a", "num_latents": 8, "sparsity": {"kind": "batch_topk", "k": 9}}],
            "crosscoder 'a': expected 1 <= k <= num_latents = 8 for batch_topk, got k=9",
        ),
        ("resources", {"training": {"data": 3}}, "training.batch_rows: expected a multiple of"),
        ("analyses", {"causality": None, "steering": {}}, "analyses.steering.prompts_path: expected a file of prompts"),
    ],
    ids=["layer", "model", "corpus", "k", "workers", "prompts"],
)
def test_faults_known_before_the_start_leave_nothing(
    refused: Refused, pair: dict[str, Path], tmp_path: Path, key: str, value: Any, expected: str
) -> None:
    root = tmp_path / "runs"
    path = run_file(tmp_path, str(root), **pretrained(pair, **{key: value}))
    assert expected in refused("run", str(path))
    assert not root.exists()


def test_an_unknown_key_names_the_nearest(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "trainin": {}}))
    assert "trainin: unknown key; did you mean 'training'?" in refused("plan", str(path))


def test_models_of_different_width_are_refused(refused: Refused, pair: dict[str, Path], tmp_path: Path) -> None:
    chat = shutil.copytree(pair["chat"], tmp_path / "chat")
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    models = {"base": {"source": str(pair["base"])}, "chat": {"source": str(chat)}}
    path = run_file(tmp_path, str(tmp_path / "runs"), **pretrained(pair, models=models))
    assert "expected two models of the same width, got 32" in refused("run", str(path))
    assert not (tmp_path / "runs").exists()


def test_vocabularies_that_disagree_are_refused(refused: Refused, pair: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(pair["base"], tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha() and len(word) > 2][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    models = {"base": {"source": str(base)}, "chat": {"source": str(pair["chat"])}, "dtype": "float32"}
    path = run_file(tmp_path, str(tmp_path / "runs"), **pretrained(pair, models=models))
    assert "expected the two models to share their vocabulary" in refused("run", str(path))
    assert not list((tmp_path / "runs").glob("tokens/*/*"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "corpus 'mine': expected at least one document, got none"),
        ('{"text": "fine"}\n{"text": \n', "line 2: expected a JSON object"),
        ('{"content": "fine"}\n', "1 column missing"),
    ],
    ids=["empty", "not-json", "other-column"],
)
def test_a_corpus_without_documents_is_refused(
    refused: Refused, pair: dict[str, Path], tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "mine.jsonl").write_text(text)
    sources = [{"name": "mine", "kind": "jsonl", "paths": [str(tmp_path / "mine.jsonl")], "text_column": "text"}]
    path = run_file(tmp_path, str(tmp_path / "runs"), **pretrained(pair, corpus={"sources": sources}))
    assert expected in refused("run", str(path))
    assert files(tmp_path / "runs") == []


def test_an_unreadable_file_of_a_corpus_is_named_and_nothing_is_left(
    refused: Refused, pair: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 100)[:-12])
    sources = [{"name": "mine", "kind": "jsonl", "paths": [str(tmp_path / "*.gz")], "text_column": "text"}]
    path = run_file(tmp_path, str(tmp_path / "runs"), **pretrained(pair, corpus={"sources": sources}))
    line = refused("run", str(path))
    assert "corpus 'mine': " in line
    assert "mine.jsonl.gz: expected a readable file, got EOFError" in line
    assert files(tmp_path / "runs") == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['content'] }}|{% endfor %}", "expected a chat template that tells user from"),
        ("{{ raise_exception('never') }}", "expected a chat template that renders a plain dialogue"),
        ("{% for m in messages %}", "tokens.chat_template: "),
        (None, "tokens.chat_template: expected an existing file"),
    ],
    ids=["no-roles", "refuses", "no-template", "absent"],
)
def test_a_chat_template_that_cannot_be_used_is_refused_before_anything_is_made(
    refused: Refused, pair: dict[str, Path], tmp_path: Path, template: str | None, expected: str
) -> None:
    if template is not None:
        (tmp_path / "mine.jinja").write_text(template)
    tokens = {"chat_template": str(tmp_path / "mine.jinja")}
    path = run_file(tmp_path, str(tmp_path / "runs"), **pretrained(pair, tokens=tokens))
    assert expected in refused("run", str(path))
    assert files(tmp_path / "runs") == []


def test_unwritable_storage_is_refused(refused: Refused, pair: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = run_file(tmp_path, str(tmp_path / "file" / "runs"), **pretrained(pair))
    assert "set storage.root elsewhere" in refused("run", str(path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_disk_that_is_too_small_is_found_before_anything_is_made(
    refused: Refused, pair: dict[str, Path], tmp_path: Path, small_disk: Path
) -> None:
    path = run_file(tmp_path, str(small_disk / "runs"), **pretrained(pair))
    line = refused("run", str(path))  # how much there is to store is known from a sample of the texts
    assert "of free space for the activations" in line
    assert "activations.mode: stream" in line
    assert files(small_disk / "runs") == []


def test_plan_refuses_a_store_that_does_not_fit(
    refused: Refused, pair: dict[str, Path], tmp_path: Path, small_disk: Path
) -> None:
    path = run_file(tmp_path, str(small_disk / "runs"), **pretrained(pair, tokens={"num_tokens": 100_000}))
    assert "of free space for the activations" in refused("plan", str(path))


def test_a_damaged_shard_is_named(refused: Refused, finished: Finished, tmp_path: Path) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens", "activations")
    shard = next(root.glob("activations/*/train-00000.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    path = run_file(tmp_path, str(root), tracking={"kind": "none"})
    line = refused("run", str(path))
    assert f"damaged shard {shard}" in line
    assert "run again" in line
    assert not list(root.glob("crosscoder/*/*"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.precision=tf32", "tf32"),
        ("crosscoders.l1.lr=1e30", "expected a finite loss and gradient"),
    ],
    ids=["precision", "divergence"],
)
def test_a_training_that_cannot_go_on_says_why(
    refused: Refused, finished: Finished, tmp_path: Path, override: str, expected: str
) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens", "activations")
    path = run_file(tmp_path, str(root), tracking={"kind": "none"})
    assert expected in refused("run", str(path), "--set", override)
    assert not list(root.glob("crosscoder/*/*"))


def test_an_artifact_of_another_version_is_refused(refused: Refused, finished: Finished, tmp_path: Path) -> None:
    root = copied(finished, tmp_path, "organism")
    record = next(root.glob("organism/*/record.json"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "schema_version": 0}))
    path = run_file(tmp_path, str(root), tracking={"kind": "none"})
    assert "expected an artifact of schema version 1, got version 0" in refused("run", str(path))
