"""How often the intervals of nu hold the true value, on the crosscoders of a finished planted benchmark.

    crossray benchmark workloads/planted.yaml
    python -m workloads.benchmarks.coverage workloads/planted.yaml --recipe batch_topk --seeds 0 1 2

A planted world has as many documents as one asks for. Each crosscoder is judged on many blocks of fresh documents, each
as large as `rows.validation` of the file. The true nu of a latent is that of all blocks together and of as many
blocks again, on which no interval is computed. An interval is right where it holds the true value, and 95% of them
should. All live latents count whose ratio is defined in a block.

Shapes: B rows, M models, D width.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.latent_tables import latent_scaling
from pipeline.analyses.rows import RowBatch, Sums, analyse, encoded_batches
from pipeline.config.run_file import load_as
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.statistics import student_t_quantile
from pipeline.planted.benchmark import Job, jobs_of
from pipeline.planted.settings import BenchmarkConfig
from pipeline.planted.world import World
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import read_record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import text_table

RATIOS = ("nu_eps", "nu_r")
PART = "coverage"
"""Name of the documents that no other part of a world uses."""


def fresh_batches(crosscoder: Crosscoder, world: World, block: int, num_documents: int) -> Iterator[RowBatch]:
    """The encoded rows of one block, rounded to bfloat16 as those of a store."""
    made = world.documents(PART, block, num_documents)
    zeros_B = torch.zeros(len(made.x_BMD), dtype=torch.int32)
    yield from encoded_batches(
        crosscoder,
        {
            "x": made.x_BMD.bfloat16(),
            "token_id": zeros_B,
            "doc_id": made.doc_id_B,
            "position": made.position_B.int(),
            "flags": zeros_B,
            "corpus": zeros_B,
        },
    )


def covered(config: BenchmarkConfig, trial: Job, storage: Storage, *, num_blocks: int) -> pd.DataFrame:
    """A row per block, live latent and ratio: true, low, high, holds."""
    seed = trial.item["seed"]
    if read_record(storage, trial.key) is None:
        raise InputError(
            f"{trial.name}, seed {seed}: expected a finished trial, got none: run `crossray benchmark` first"
        )
    crosscoder = Crosscoder.from_pretrained(storage.url(trial.key.folder))
    rms_M = ActivationStore(storage, trial.item["activations"]).manifest.training_rms_M()
    analysis = latent_scaling(crosscoder, config.judge, rms_M=rms_M)
    world = World(config.world.spec(), seed)
    num_documents = max(1, config.rows.validation // config.world.document_rows)
    parts = []
    for block in range(2 * num_blocks):
        parts.append(_sums(analysis, fresh_batches(crosscoder, world, block, num_documents)))
        print(f"{trial.name}, seed {seed}: block {block + 1} of {2 * num_blocks}", flush=True)
    whole = analysis.start()
    for part in parts:
        whole = analysis.merge(whole, part)
    truth = analysis.table(whole)
    rows = []
    for block, part in enumerate(parts[:num_blocks]):
        table = analysis.table(part)
        for ratio in RATIOS:
            low, high, true = table[f"{ratio}_low"], table[f"{ratio}_high"], truth[ratio]
            one = pd.DataFrame({"latent": table["latent"], "true": true, "low": low, "high": high}).dropna()
            rows.append(
                one.assign(holds=one["true"].between(one["low"], one["high"]), ratio=ratio, block=block, seed=seed)
            )
    return pd.concat(rows)


def _sums(analysis: LatentScaling, batches: Iterator[RowBatch]) -> Sums:
    return analyse({"scaling": analysis}, batches)["scaling"]


def coverage_rows(table: pd.DataFrame) -> list[list[str]]:
    """Cells: ratio, which latents, how many intervals, share that hold the truth with its interval over the seeds."""
    rows = []
    for ratio, own in table.groupby("ratio", sort=False):
        true = own["true"]
        kinds = {
            "all live": true.notna(),
            "below 0.2": true < 0.2,
            "0.2 to 0.8": true.between(0.2, 0.8),
            "above 0.8": true > 0.8,
        }
        for name, chosen in kinds.items():
            shares = torch.tensor(own[chosen].groupby("seed")["holds"].mean().to_numpy())
            half = student_t_quantile(0.975, torch.tensor(len(shares) - 1.0)) * shares.std() / len(shares) ** 0.5
            share = f"{shares.mean():.1%}" + (f" +- {half:.1%}" if len(shares) > 1 else "")
            rows.append([str(ratio), name, f"{int(chosen.sum()):,}", share])
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--recipe", default="batch_topk")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], help="as for crossray benchmark")
    settings = parser.parse_args()
    config = load_as(BenchmarkConfig, settings.file, settings.set)
    storage = Storage(config.storage.root)
    chosen = {seed: None for seed in settings.seeds} | {
        trial.item["seed"]: trial
        for trial in jobs_of(config)[1]
        if trial.name == settings.recipe and trial.item["seed"] in settings.seeds
    }
    missing = [str(seed) for seed, trial in chosen.items() if trial is None]
    if missing:
        raise InputError(
            f"--seeds: expected seeds of {settings.recipe} in {settings.file}, got {', '.join(missing)} beside"
        )
    table = pd.concat(
        [covered(config, trial, storage, num_blocks=settings.blocks) for trial in chosen.values() if trial is not None]
    )
    print(text_table(["ratio", "true value", "intervals", "hold it [95% over seeds]"], coverage_rows(table)))


if __name__ == "__main__":
    main()
