"""Memory of driver and head over a run: extraction of 1, 10, 100 and 400 shards of the same size.

Run from the repository's root: `python -m workloads.benchmarks.driver_memory`. It builds a pair of small random models
(two layers, D = 512), tokenises the tiny organism's documents and extracts them. Each number of shards has its own
process with a fresh Ray cluster. It prints the bytes written, the driver's resident memory before and its peak during
extraction, and the peak of the object store. At a quarter, at half and at the end of the stage it prints the anonymous
memory of the driver, of the head's service (GCS) and of the raylet. Five minutes on two cores.
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

from workloads.benchmarks.processes import Watch
from workloads.benchmarks.staged import build_inputs, stage_of, write_run_file

WIDTH = 512
WATCHED = ("driver", "gcs", "raylet")
PLACES = (0.25, 0.5, 1.0)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def run_file(folder: Path, num_shards: int, shard_rows: int) -> Path:
    """A run of `num_shards` training shards, and one tenth as many for validation."""
    settings: dict[str, Any] = {
        "tokens": {"num_tokens": int(num_shards * shard_rows / 0.9)},
        "activations": {"layer": 0, "rows_per_shard": shard_rows},
        "storage": {"root": str(folder / f"runs-{num_shards}")},
    }
    return write_run_file(folder, f"shards-{num_shards}", settings)


def measure(path: Path) -> dict[str, Any]:
    """Run the three data stages in this process; memory in bytes."""
    import ray

    from pipeline.cluster import connect as cluster

    held = [0.0]
    stop = threading.Event()

    def watch_store() -> None:
        total = ray.cluster_resources()["object_store_memory"]
        while not stop.wait(0.1):
            held[0] = max(held[0], total - ray.available_resources().get("object_store_memory", 0.0))

    stage = stage_of(path, "activations")
    with cluster.connected(stage.config.resources.cluster, path.with_suffix(".log")):
        for name in ("corpus", "tokens"):
            stage_of(path, name).run()
        before = resident_bytes("VmRSS")
        watcher = threading.Thread(target=watch_store, daemon=True)
        watcher.start()
        started = time.monotonic()
        with Watch() as watch:
            stage.run()
        seconds = time.monotonic() - started
        stop.set()
        watcher.join()
        counts = stage.context.record_of(stage.step).counts
    return {
        "shards": counts["num_shards"],
        "written": counts["num_bytes"],
        "before": before,
        "peak": resident_bytes("VmHWM"),
        "object_store": held[0],
        "seconds": seconds,
        **{role: [watch.memory_bytes(place)[role] for place in PLACES] for role in WATCHED},
    }


def line_of(found: dict[str, Any]) -> str:
    """One reading."""
    cells = [f"{found[name] / 1e6:.1f}" for name in ("written", "before", "peak", "object_store")]
    cells += [", ".join(f"{value / 1e6:.1f}" for value in found[role]) for role in WATCHED]
    return f"| {found['shards']} | {' | '.join(cells)} | {found['seconds']:.0f} |"


def main() -> None:
    """Build the inputs once, then measure each number of shards in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10, 100, 400])
    parser.add_argument("--shard-rows", type=int, default=1000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="crossray-memory-") as name:
        folder = Path(name)
        build_inputs(folder, width=WIDTH, copies=2 + max(arguments.shards) * arguments.shard_rows // 8000)
        print(f"| shards | written MB | driver before MB | peak | object store | {', '.join(WATCHED)}")
        for num_shards in arguments.shards:
            command = [sys.executable, "-m", "workloads.benchmarks.driver_memory", "--measure"]
            path = run_file(folder, num_shards, arguments.shard_rows)
            done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            print(line_of(json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
