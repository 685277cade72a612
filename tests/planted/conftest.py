"""A small benchmark: one world, 150 to 300 steps a recipe, in this process; the full one is workloads/planted.yaml."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch

from pipeline.config.run_file import load_as
from pipeline.planted.benchmark import Job, jobs_of, record_job, scored
from pipeline.planted.settings import BenchmarkConfig
from pipeline.planted.trial import Plant, Trial
from pipeline.storage.filesystem import Storage

FILE = Path(__file__).parent.parent.parent / "workloads" / "planted.yaml"
SMALL = [
    "seeds=[0]",
    "world.activation_dim=32",
    "world.concepts={shared: 18, half_present: 10, rotated: 4, loose: 4, chat_only: 8, base_only: 4}",
    "world.frequency_max=0.12",
    "world.frequency_min=0.02",
    "rows={train: 16000, validation: 16000, per_shard: 8000}",
    "training={batch_rows: 256, num_rows: 76800}",
    "judge.num_resamples=200",
]
RECIPES = """
- {name: l1, sparsity: {kind: l1, mu: 0.15, mu_warmup_steps: 100}, num_latents: 80, init_norm: 0.1, clip_norm: 1.0,
   lr: 1e-2, lr_warmup_steps: 20, lr_decay_frac: 0.3}
- {name: batch_topk, sparsity: {kind: batch_topk, k: 3, threshold_start_step: 100, threshold_decay: 0.99,
   dead_after_rows: 5000}, num_latents: 80, seeds: 3, lr: 1e-2, lr_warmup_steps: 20, lr_decay_frac: 0.3}
- {name: difference, inputs: difference, sparsity: {kind: batch_topk, k: 1, threshold_start_step: 100,
   threshold_decay: 0.99, dead_after_rows: 5000}, num_latents: 80, lr: 1e-2, lr_warmup_steps: 20, lr_decay_frac: 0.3}
- {name: dedicated, dedicated_frac: 0.15, sparsity: {kind: batch_topk, k: 3, threshold_start_step: 100,
   threshold_decay: 0.99, dead_after_rows: 5000}, num_latents: 80, lr: 1e-2, lr_warmup_steps: 20, lr_decay_frac: 0.3}
"""


class Benchmark(NamedTuple):
    config: BenchmarkConfig
    storage: Storage
    worlds: dict[int, Job]
    trials: list[Job]
    table: pd.DataFrame

    def row(self, recipe: str, rule: str) -> pd.Series:
        return self.table[(self.table["recipe"] == recipe) & (self.table["rule"] == rule)].iloc[0]


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkConfig:
    root = tmp_path_factory.mktemp("planted")
    recipes = " ".join(RECIPES.split())
    return load_as(BenchmarkConfig, FILE, [*SMALL, f"recipes={_as_list(recipes)}", f"storage.root={root}"])


def _as_list(text: str) -> str:
    return f"[{text.strip().removeprefix('- ').replace(' - {', ', {')}]"


@pytest.fixture(scope="session")
def small(small_config: BenchmarkConfig) -> Benchmark:
    return made(small_config)


def made(config: BenchmarkConfig) -> Benchmark:
    """A benchmark run in this process, on one thread."""
    storage = Storage(config.storage.root)
    worlds, trials = jobs_of(config)
    plant = Plant(storage, config.world, config.rows)
    trial = Trial(storage, config.training, config.judge)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in worlds.values():
            record_job(config, storage, job, plant(job.item))
        for job in trials:
            record_job(config, storage, job, trial(job.item))
    finally:
        torch.set_num_threads(before)
    return Benchmark(config, storage, worlds, trials, scored(config, storage, worlds, trials))
