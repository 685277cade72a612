"""Whole runs of models against their own rescaled copies: same function, so nothing may be new.

    python -m workloads.benchmarks.same_function [--factors 0.1 2 8 10 100] [--root runs/same_function]

The pairs: the demo's trained base model (Gemma 2) and a Llama with random weights, each against itself with a residual
stream of FACTOR times the size, which every norm that reads it undoes. Prints what `crossray run` says with the default
settings; a finished run is read again and not repeated.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import crossray
from pipeline.organisms.build import build, spec_of
from pipeline.schema import Verdict
from pipeline.terminal import text_table

FACTORS = (0.1, 2.0, 8.0, 10.0, 100.0)
_CROSSCODERS = [
    {"name": "l1", "num_latents": 512, "lr": 2e-3, "lr_warmup_steps": 50, "sparsity": {"kind": "l1", "target_l0": 16}},
    {
        "name": "batch_topk",
        "num_latents": 512,
        "lr": 2e-3,
        "lr_warmup_steps": 50,
        "sparsity": {"kind": "batch_topk", "k": 16, "threshold_start_step": 200, "dead_after_rows": 100_000},
    },
]


@torch.no_grad()
def rescaled(model: Any, factor: float) -> Any:
    """A copy of a Llama or Gemma 2 with a stream of `factor` times the size and, but for rounding, the same logits."""
    made = copy.deepcopy(model)
    made.model.embed_tokens.weight.mul_(factor)
    for layer in made.model.layers:
        if hasattr(layer, "post_feedforward_layernorm"):  # Gemma 2 writes through norms of weight 1 + w
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.copy_(factor * (1 + norm.weight) - 1)
        else:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    return made


def untied(model: Any) -> Any:
    """The model with an output matrix of its own, so that its embeddings can be rescaled alone."""
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    return model


def random_llama(tokenizer: Any) -> Any:
    """A small Llama whose weights nobody trained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run_file(name: str, folders: dict[str, Path], texts: Path, root: Path) -> dict[str, Any]:
    """A run of a pair with everything but its size as by default, without the analyses that need a difference."""
    columns = {"documents": "text_column", "dialogues": "messages_column"}
    sources = [
        {"name": part, "kind": "jsonl", "paths": [str(texts / f"{part}.jsonl")], column: column.removesuffix("_column")}
        for part, column in columns.items()
    ]
    return {
        "name": name,
        "models": {member: {"source": str(folder)} for member, folder in folders.items()} | {"dtype": "float32"},
        "corpus": {"sources": sources},
        "activations": {"layer": 3},
        "training": {"batch_rows": 1024, "num_rows": 512_000},
        "crosscoders": _CROSSCODERS,
        "analyses": dict.fromkeys(("causality", "examples", "steering")),
        "storage": {"root": str(root)},
        "tracking": {"kind": "none"},
    }


def main() -> None:
    """Makes the pairs, runs them, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--architectures", nargs="+", default=("gemma2", "llama"), choices=("gemma2", "llama"))
    parser.add_argument("--root", type=Path, default=Path("runs/same_function"))
    options = parser.parse_args()
    root = options.root.resolve()
    organism = root / "organism"
    if not (organism / "organism.json").exists():
        organism.mkdir(parents=True, exist_ok=True)
        build(organism, spec_of("demo"), lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(organism / "base")
    trained = untied(AutoModelForCausalLM.from_pretrained(organism / "base"))
    originals = {"gemma2": trained, "llama": random_llama(tokenizer)}
    rows = []
    for architecture in options.architectures:
        for factor in options.factors:
            pair = {"base": originals[architecture], "chat": rescaled(originals[architecture], factor)}
            folders = {member: root / "models" / f"{architecture}-{factor:g}" / member for member in pair}
            for member, model in pair.items():
                model.save_pretrained(folders[member])
                tokenizer.save_pretrained(folders[member])
            name = f"{architecture}-times-{factor:g}".replace(".", "-")
            run = crossray.run(run_file(name, folders, organism, root / "runs"))
            print(run.verdict().splitlines()[0], flush=True)
            for crosscoder in ("l1", "batch_topk"):
                verdicts = run.latents(crosscoder)["verdict"].value_counts()
                num_live = int(verdicts.sum() - verdicts.get(Verdict.DEAD, 0))
                kinds = (Verdict.SHARED, Verdict.CHAT_SPECIFIC, Verdict.WITHHELD)
                counts = [int(verdicts.get(kind, 0)) for kind in kinds]
                rows.append([architecture, f"{factor:g}", crosscoder, str(num_live), *map(str, counts)])
    head = ["model", "times", "crosscoder", "live", "shared", "chat-specific", "withheld"]
    print(text_table(head, rows))


if __name__ == "__main__":
    main()
