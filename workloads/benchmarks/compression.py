"""The effect of compressing an activation store on bytes and on variance explained.

    python -m workloads.benchmarks.compression --root runs --store activations/0123456789abcdef --steps 600

It repacks a finished, uncompressed store in each kind, trains the same crosscoder on each from the same seeds, and
evaluates all of them on the validation rows of the original. So a difference comes from training on compressed rows.
The noise of the rows themselves is printed too. Readings are kept in store_notes.md.
"""

import argparse
import tempfile
import time

import torch
from torch import Tensor

from pipeline.numerics.moments import moments_of, variance_explained
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from pipeline.schema import Split
from pipeline.storage.activation_store import MANIFEST_NAME, ActivationStore, Manifest, Shard
from pipeline.storage.filesystem import Storage
from pipeline.storage.row_order import ReadOptions, TrainingRows
from pipeline.storage.shards import INT8, LOSSLESS, NONE, publish_shard


def repack(store: ActivationStore, storage: Storage, kind: str) -> ActivationStore:
    """The same rows in another form."""
    shards = []
    for shard in store.manifest.shards:
        file = publish_shard(storage, f"{kind}/{shard.name}", store.read(shard), kind)
        shards.append(Shard(shard.name, shard.split, shard.num_rows, shard.num_documents, *file))
    manifest = Manifest(tuple(shards), store.manifest.num_models, store.manifest.activation_dim, (), (), (), kind)
    storage.write_json(f"{kind}/{MANIFEST_NAME}", manifest.to_json())
    return ActivationStore(storage, kind)


def validation_rows(store: ActivationStore) -> Tensor:
    """x_BMD of the validation part, float32."""
    return torch.cat([store.read(shard).x_BMD.float() for shard in store.manifest.of_split(Split.VALIDATION)])


def fve_of(store: ActivationStore, x_BMD: Tensor, settings: argparse.Namespace, seed: int) -> Tensor:
    """FVE per model, on these rows, of a crosscoder trained on the store."""
    spec = CrosscoderSpec(
        num_models=store.manifest.num_models,
        activation_dim=store.manifest.activation_dim,
        num_latents=settings.latents,
        num_steps=settings.steps,
        sparsity=BatchTopK(k=settings.k),
        lr=settings.lr,
        lr_warmup_steps=settings.steps // 20,
        seed=seed,
    )
    trainer = CrosscoderTrainer(spec)
    rows = TrainingRows(store, seed=seed, batch_rows=settings.batch, options=ReadOptions(dtype=torch.float32))
    for step, batch_BMD in enumerate(rows.batches(0, settings.steps)):
        if step == 0:
            trainer.initialise(batch_BMD)
        trainer.step(batch_BMD)
    crosscoder = trainer.crosscoder()
    with torch.no_grad():
        residual = [part_BMD - crosscoder(part_BMD) for part_BMD in torch.split(x_BMD, 4096)]
    return variance_explained(moments_of(x_BMD), moments_of(torch.cat(residual)))


def main() -> None:
    """Measure and print the case of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="storage root")
    parser.add_argument("--store", required=True, help="folder of the activations below it")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2)
    settings = parser.parse_args()
    original = ActivationStore(Storage(settings.root), settings.store)
    x_BMD = validation_rows(original)
    total_M = moments_of(x_BMD).variance_M()
    num_rows = sum(shard.num_rows for shard in original.manifest.shards)
    print(f"{num_rows} rows of {list(x_BMD.shape[1:])}, {time.strftime('%F')}")
    with tempfile.TemporaryDirectory(prefix="crossray-compression-") as folder:
        for kind in (NONE, LOSSLESS, INT8):
            packed = repack(original, Storage(folder), kind)
            num_bytes = sum(shard.num_bytes for shard in packed.manifest.shards)
            noise_M = moments_of(validation_rows(packed) - x_BMD).variance_M() / total_M
            noise = "  ".join(f"{value:.2e}" for value in noise_M.tolist())
            print(f"{kind:9s} {num_bytes / 1e6:8.1f} MB  noise / variance {noise}", end="")
            for seed in range(settings.seeds):
                fve = fve_of(packed, x_BMD, settings, seed).tolist()
                print(f"  seed {seed}: FVE {fve[0]:.5f} {fve[1]:.5f}", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
