"""A control of the whole method: crosscoders on random rows, in which no model holds a concept.

    python -m workloads.benchmarks.random_rows

Both models' rows are Gaussian noise, drawn anew at every step: independent of each other, as in the published control
(the code of arXiv 2504.02922), or equal but for a tenth of noise. The table says what Delta_norm,
the ratios and the verdict make of the fitted latents. With independent noise the chat model's rows are news to the base
model: what is called chat-specific there is noise that the model really has alone, and no ratio can tell it from a
concept. It takes minutes on one core; the readings are in docs/how-right.md.

Shapes: B rows, M models, D width.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.latent_tables import verdict_analyses, verdict_table
from pipeline.analyses.rows import analyse, encoded_batches
from pipeline.analyses.units import judged_decoder
from pipeline.config.analyses import LatentScalingSection
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from pipeline.schema import Ownership, Verdict

BATCH, DOCUMENT_ROWS = 1024, 64
SPARSITIES = {"l1": L1(target_l0=4), "batch_topk": BatchTopK(k=4, dead_after_rows=20_000)}
AGREEMENT = {"independent": 0.0, "nearly equal": 0.9}
"""Share of the chat model's rows that is the base model's; the rest is its own noise."""


def random_rows(number: int, width: int, agreement: float, seed: int) -> Tensor:
    """x_BMD of unit variance."""
    base_BD, own_BD = torch.randn(2, number, width, generator=torch.Generator().manual_seed(seed))
    return torch.stack([base_BD, agreement * base_BD + (1 - agreement**2) ** 0.5 * own_BD], dim=1)


def fitted(sparsity: str, agreement: float, *, width: int, steps: int, seed: int) -> Crosscoder:
    """A crosscoder of eight latents per dimension."""
    spec = CrosscoderSpec(
        num_models=2,
        activation_dim=width,
        num_latents=8 * width,
        num_steps=steps,
        sparsity=SPARSITIES[sparsity],
        lr=2e-3,
        lr_warmup_steps=steps // 20,
        lr_decay_frac=0.3,
        seed=seed,
    )
    trainer = CrosscoderTrainer(spec)
    for step in range(steps):
        x_BMD = random_rows(BATCH, width, agreement, seed=1000 * seed + step)
        if step == 0:
            trainer.initialise(x_BMD)
        trainer.step(x_BMD)
    return trainer.crosscoder()


def judged(crosscoder: Crosscoder, agreement: float, *, rows: int) -> tuple[pd.DataFrame, float]:
    """The latent table on fresh rows, cut into documents, and the FVE."""
    x_BMD, zeros_B = random_rows(rows, crosscoder.activation_dim, agreement, seed=-1), torch.zeros(rows).int()
    batch = {"x": x_BMD, "doc_id": torch.arange(rows) // DOCUMENT_ROWS, "position": torch.arange(rows).int()}
    batch |= {name: zeros_B for name in ("token_id", "flags", "corpus")}
    settings, rms_M = LatentScalingSection(), torch.full((2,), crosscoder.activation_dim**0.5)
    analyses = verdict_analyses(crosscoder, settings, corpora=("rows",), rms_M=rms_M)
    sums = analyse(analyses, encoded_batches(crosscoder, batch))
    tables: dict[str, Any] = {name: analysis.table(sums[name]) for name, analysis in analyses.items()}
    table = verdict_table(judged_decoder(crosscoder, rms_M), tables, settings)
    return table, tables["fidelity"]["fve"]


def lines(settings: argparse.Namespace) -> Iterator[str]:
    """The table's rows, each the mean over seeds."""
    for name, agreement in AGREEMENT.items():
        for sparsity in SPARSITIES:
            found = []
            for seed in range(settings.seeds):
                crosscoder = fitted(sparsity, agreement, width=settings.width, steps=settings.steps, seed=seed)
                table, fve = judged(crosscoder, agreement, rows=settings.rows)
                live = table[table["verdict"] != Verdict.DEAD]
                shares = [float((live["ownership"] == one).mean()) for one in (Ownership.CHAT_ONLY, Ownership.SHARED)]
                called = float((live["verdict"] == Verdict.CHAT_SPECIFIC).mean())
                found.append([len(live), *shares, live["nu_eps"].median(), live["nu_r"].median(), called, fve])
            alive, chat_only, shared, nu_eps, nu_r, called, fve = torch.tensor(found).nanmean(0).tolist()
            yield (
                f"| {name} | {sparsity} | {alive:.0f} | {chat_only:.0%} | {shared:.0%} | {nu_eps:.2f} | {nu_r:.2f} | "
                f"{called:.0%} | {fve:.2f} |"
            )


def main() -> None:
    """Print a row per kind of noise and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=32_000)
    parser.add_argument("--seeds", type=int, default=4)
    print("| rows | sparsity | live | chat-only | shared | median nu_eps | median nu_r | chat-specific | FVE |")
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
