"""Settings that cannot work in a run are told before it starts, by their key; what works is not commented on."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, run_file

from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.run.advice import advice
from pipeline.run.flow import build_flow


def told(folder: Path, *overrides: str, **changes: Any) -> list[str]:
    """The keys of all lines for a tiny run."""
    lines = advice(load(run_file(folder, str(folder / "runs"), **changes), overrides))
    assert all("\n" not in line for line in lines)
    return [line.partition(":")[0] for line in lines]


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("training.shuffle_seed=0", []),
        ("crosscoders.l1.lr_warmup_steps=100000", ["crosscoders.l1.lr_warmup_steps"]),
        ("crosscoders.l1.sparsity.mu_warmup_steps=100000", ["crosscoders.l1.sparsity.mu_warmup_steps"]),
        ("crosscoders.batch_topk.sparsity.dead_after_rows=1e12", ["crosscoders.batch_topk.sparsity.dead_after_rows"]),
        ("crosscoders.batch_topk.sparsity.k_anneal_steps=1e6", []),  # nothing is annealed without k_start
        (
            "crosscoders.batch_topk.sparsity.threshold_start_step=1e6",
            ["crosscoders.batch_topk.sparsity.threshold_start_step"],
        ),
    ],
)
def test_schedules_beyond_the_run_are_told(tmp_path: Path, override: str, keys: list[str]) -> None:
    assert told(tmp_path, override) == keys


def model(folder: Path, *, template: bool = True, **config: Any) -> dict[str, str]:
    """A folder with the files that are looked at."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"} if template else {}))
    return {"source": str(folder)}


@pytest.mark.parametrize(
    ("base", "chat", "is_told"),
    [
        ({"max_position_embeddings": 1024}, {"max_position_embeddings": 2048}, False),
        ({"max_position_embeddings": 2048}, {"max_position_embeddings": 1023}, True),
        ({"n_positions": 512}, {}, True),
        ({}, {"text_config": {"max_position_embeddings": 128}}, True),
        ({"max_position_embeddings": "many"}, {"max_position_embeddings": None}, False),
    ],
)
def test_documents_beyond_the_models_context_are_told(
    tmp_path: Path, base: dict[str, Any], chat: dict[str, Any], is_told: bool
) -> None:
    models = {"base": model(tmp_path / "a", **base), "chat": model(tmp_path / "b", **chat)}
    found = told(tmp_path, "tokens.max_tokens_per_document=1024", models=models)
    assert found == ["tokens.max_tokens_per_document"] * is_told


@pytest.mark.parametrize(
    ("base", "chat", "is_told"),
    [
        ("google/gemma-2-2b", "google/gemma-2-2b-it", False),
        ("google/gemma-2-2b-it", "google/gemma-2-2b", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B", True),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base", True),
        ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-1.7B", False),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt", True),
        ("meta-llama/Llama-3.2-1B-Instruct", "someone/my-finetune", False),  # fine-tuned from a chat model
        ("google/gemma-2-2b-it", "google/gemma-2-2b-it", False),
        ("a/recapitulate", "a/recapitul", False),  # marks are words of their own
    ],
)
def test_names_in_the_wrong_places_are_told(tmp_path: Path, base: str, chat: str, is_told: bool) -> None:
    assert told(tmp_path, models={"base": {"source": base}, "chat": {"source": chat}}) == ["models"] * is_told


def test_templates_adapters_and_members_in_the_wrong_places_are_told(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one"), model(tmp_path / "two", template=False)
    assert told(tmp_path, models={"base": one, "chat": two}) == ["models"]
    assert told(tmp_path, models={"base": two, "chat": one}) == []
    adapted = {**one, "adapter": "mine"}
    assert told(tmp_path, models={"base": adapted, "chat": one}) == ["models"]
    assert told(tmp_path, models={"base": one, "chat": adapted}) == []
    members = [{"kind": "organism", "member": member} for member in ("base", "chat")]
    assert told(tmp_path, models={"base": members[1], "chat": members[0]}) == ["models"]
    assert told(tmp_path, models={"base": members[0], "chat": members[1]}) == []


def test_causality_without_dialogues_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    plain = {"sources": [source for source in TINY["corpus"]["sources"] if source.get("part") == "documents"]}
    analyses = {**TINY["analyses"], "causality": {}}
    with pytest.raises(InputError, match=r"analyses\.causality: .*documents"):
        build_flow(load(run_file(tmp_path, str(tmp_path / "runs"), corpus=plain, analyses=analyses)))
    analyses["causality"] = None
    build_flow(load(run_file(tmp_path, str(tmp_path / "runs"), corpus=plain, analyses=analyses)))
    assert not (tmp_path / "runs").exists()


def test_prompts_that_cannot_be_read_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[" * 100_000)
    analyses = {**TINY["analyses"], "steering": {"prompts_path": str(prompts), "num_latents": 1}}
    with pytest.raises(InputError, match=r"analyses\.steering\.prompts_path: .*prompts\.json"):
        build_flow(load(run_file(tmp_path, str(tmp_path / "runs"), analyses=analyses)))
