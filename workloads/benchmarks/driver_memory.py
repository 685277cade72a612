"""Does the driver's memory grow with the number of shards? Extraction of 1, 10 and 100 shards of the same size.

Run from the repository's root: `python -m workloads.benchmarks.driver_memory`. It builds a pair of small random models
(two layers, D = 512), tokenises the tiny organism's documents and extracts them, each number of shards in a process of
its own with a fresh Ray cluster. Printed per number of shards: bytes written, the driver's resident memory before and
its peak during extraction, and the most that the object store held. About two minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml

ROWS_PER_SHARD = 1000
WIDTH = 512


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def build_inputs(folder: Path) -> None:
    """Two random models with the organism's tokenizer, and a corpus of its documents."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    from workloads.organisms.build import build, spec_of

    build(folder / "organism", spec_of("tiny"), lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(folder / "organism" / "chat")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
    )
    for seed, name in enumerate(("base", "chat")):
        torch.manual_seed(seed)
        Gemma2ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    documents = (folder / "organism" / "documents.jsonl").read_text().splitlines()
    copies = [json.dumps({"text": f"{json.loads(line)['text']} {n}"}) for n in range(12) for line in documents]
    (folder / "documents.jsonl").write_text("\n".join(copies) + "\n")


def run_file(folder: Path, num_shards: int) -> Path:
    """A run of `num_shards` training shards, and one tenth as many for validation."""
    path = folder / f"run-{num_shards}.yaml"
    settings: dict[str, Any] = {
        "name": f"shards-{num_shards}",
        "models": {name: {"source": str(folder / name)} for name in ("base", "chat")},
        "corpus": {
            "sources": [
                {
                    "name": "documents",
                    "kind": "jsonl",
                    "paths": [str(folder / "documents.jsonl")],
                    "text_column": "text",
                }
            ],
            "validation_frac": 0.1,
        },
        "tokens": {"num_tokens": int(num_shards * ROWS_PER_SHARD / 0.9)},
        "activations": {"layer": 1, "rows_per_shard": ROWS_PER_SHARD},
        "crosscoders": [{"name": "unused", "num_latents": 64, "sparsity": {"kind": "l1"}}],
        "analyses": {"planted": None, "steering": None, "causality": None},
        "storage": {"root": str(folder / f"runs-{num_shards}")},
        "tracking": {"kind": "none"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


class Unwatched:
    """Curves of steps that nobody watches."""

    def points(self, step: object, points: object) -> None:
        """Drop them."""


def measure(path: Path) -> dict[str, float]:
    """Run the three data stages in this process; memory in bytes."""
    import ray

    from pipeline import cluster
    from pipeline.config import load
    from pipeline.flow import build_flow
    from pipeline.progress import SilentReporter
    from pipeline.stages.base import Context
    from pipeline.storage import Storage

    config = load(path)
    storage = Storage(config.storage.root)
    context = Context(storage, config.resources, SilentReporter(), Unwatched(), config.name, 10)
    held = [0.0]
    stop = threading.Event()

    def watch() -> None:
        total = ray.cluster_resources()["object_store_memory"]
        while not stop.wait(0.1):
            held[0] = max(held[0], total - ray.available_resources().get("object_store_memory", 0.0))

    with cluster.connected(config.resources.cluster, path.with_suffix(".log")):
        groups = {group.steps[0].key.stage: group for group in build_flow(config)}
        for stage in ("corpus", "tokens"):
            groups[stage].run(groups[stage].steps, context)
        before = resident_bytes("VmRSS")
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        started = time.monotonic()
        step = groups["activations"].steps[0]
        groups["activations"].run([step], context)
        seconds = time.monotonic() - started
        stop.set()
        watcher.join()
        counts = context.record_of(step).counts
    return {
        "shards": counts["num_shards"],
        "written": counts["num_bytes"],
        "before": before,
        "peak": resident_bytes("VmHWM"),
        "object_store": held[0],
        "seconds": seconds,
    }


def main() -> None:
    """Build once, then measure every number of shards in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="crossray-memory-") as name:
        build_inputs(Path(name))
        print("shards  written MB  driver before MB  driver peak MB  object store MB  seconds")
        for num_shards in arguments.shards:
            command = [sys.executable, "-m", "workloads.benchmarks.driver_memory", "--measure"]
            path = run_file(Path(name), num_shards)
            done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{found['shards']:>6}  {found['written'] / 1e6:>10.1f}  {found['before'] / 1e6:>16.1f}  "
                f"{found['peak'] / 1e6:>14.1f}  {found['object_store'] / 1e6:>15.1f}  {found['seconds']:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
