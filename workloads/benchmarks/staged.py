"""Inputs with which benchmarks run the pipeline's real stages: a random pair, a corpus, a run file and a context.

The models are random Gemma-2 models of any size with the tiny organism's tokenizer. The corpus holds its documents,
repeated with a number so that no two are equal. `stage_of` gives one stage of a run file, to run in a started cluster.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from pipeline.config.run_file import RunConfig, load
from pipeline.organisms.build import build, spec_of
from pipeline.run.flow import AnyStep, Group, build_flow
from pipeline.run.runner import Unlogged
from pipeline.stages.step import StageContext
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter


def build_inputs(folder: Path, *, width: int, layers: int = 2, copies: int = 12) -> None:
    """Two random models, and `copies` of the organism's documents, in a folder."""
    build(folder / "organism", spec_of("tiny"), lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(folder / "organism" / "chat")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
    )
    for seed, name in enumerate(("base", "chat")):
        torch.manual_seed(seed)
        Gemma2ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    documents = (folder / "organism" / "documents.jsonl").read_text().splitlines()
    lines = [json.dumps({"text": f"{json.loads(line)['text']} {n}"}) for n in range(copies) for line in documents]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")


def write_run_file(folder: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """A run file over the inputs of `folder`; `settings` replace or add top-level sections."""
    source = {"name": "documents", "kind": "jsonl", "paths": [str(folder / "documents.jsonl")], "text_column": "text"}
    base = {
        "name": name,
        "models": {model: {"source": str(folder / model)} for model in ("base", "chat")},
        "corpus": {"sources": [source], "validation_frac": 0.1},
        "crosscoders": [{"name": "unused", "num_latents": 64, "sparsity": {"kind": "l1"}}],
        "analyses": {"planted": None, "steering": None, "causality": None},
        "storage": {"root": str(folder / "runs")},
        "tracking": {"kind": "none"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**base, **settings}))
    return path


class Stage(NamedTuple):
    """One stage of a run, with everything that it needs."""

    config: RunConfig
    group: Group
    step: AnyStep
    context: StageContext

    def run(self) -> None:
        """Make the artifact."""
        self.group.run([self.step], self.context)


def stage_of(path: Path, name: str) -> Stage:
    """The stage of this name in a run file."""
    config = load(path)
    context = StageContext(
        Storage(config.storage.root), config.resources, SilentReporter(), Unlogged(), config.name, log_every_steps=4
    )
    group = next(group for group in build_flow(config).groups if group.steps[0].key.stage == name)
    return Stage(config, group, group.steps[0], context)
