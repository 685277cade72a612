"""Speed of writing and reading the activation store, compared with raw safetensors files in the same run.

    python -m workloads.benchmarks.store --shards 8 --rows 25000 --dim 512
    python -m workloads.benchmarks.store --compression none,lossless,int8 --threads 2

GB count the activations as bfloat16, whatever their form on disk. Raw writing is save_file of safetensors, without
checksum or fsync. Raw reading maps a shard, permutes its rows and converts batches to float32, without checksum, one
shard at a time. Ours writes with SHA-256 and fsync, and mixes the rows of four shards; the first epoch compares
checksums. Contenders take turns within a round, so a change of the machine's speed affects all of them. It prints
medians and their ratios. Files stay in the page cache. Readings are kept in store_notes.md.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.schema import SHARD_TENSORS, Split
from pipeline.storage.activation_store import MANIFEST_NAME, ActivationStore, Manifest, Shard
from pipeline.storage.filesystem import Storage
from pipeline.storage.row_order import ReadOptions, TrainingRows
from pipeline.storage.shards import NONE, Rows, publish_shard, require_finite, summarise


class Case(NamedTuple):
    """One size."""

    shards: int
    rows: int
    models: int
    dim: int
    batch: int
    rounds: int
    threads: int
    compression: tuple[str, ...]

    @property
    def gigabytes(self) -> float:
        """Size of all activations as bfloat16, in bytes."""
        return 2e-9 * self.shards * self.rows * self.models * self.dim


def make_rows(case: Case, seed: int) -> Rows:
    """Rows whose coordinates differ in scale, as in a residual stream."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = torch.randn(case.dim, generator=generator).exp()
    x_BMD = torch.randn(case.rows, case.models, case.dim, generator=generator).mul_(scale_D).to(torch.bfloat16)
    numbers = torch.arange(case.rows)
    zeros = torch.zeros(case.rows, dtype=torch.int32)
    return Rows(x_BMD, numbers.int(), numbers // 100, (numbers % 100).int(), zeros, zeros.clone())


def write_raw(folder: Path, shards: list[Rows]) -> None:
    """Write plain files."""
    for number, rows in enumerate(shards):
        columns = zip((column.name for column in SHARD_TENSORS), rows, strict=True)
        save_file(dict(columns), folder / f"{number}.safetensors")


def write_store(storage: Storage, folder: str, shards: list[Rows], compression: str) -> None:
    """A store like the one that the activations stage writes."""
    described = []
    for number, rows in enumerate(shards):
        name = f"{Split.TRAIN}-{number:05d}.safetensors"
        file = publish_shard(storage, f"{folder}/{name}", rows, compression)
        described.append(Shard(name, Split.TRAIN, len(rows.x_BMD), 1, *file))
    num_models, width = shards[0].x_BMD.shape[1:]
    manifest = Manifest(tuple(described), num_models, width, ("corpus",), (), (), compression)
    storage.write_json(f"{folder}/{MANIFEST_NAME}", manifest.to_json())


def read_raw(folder: Path, case: Case) -> None:
    """Read every row once as float32 batches, permuted within its shard."""
    for number in range(case.shards):
        x_BMD: Tensor = load_file(folder / f"{number}.safetensors")["x"]
        order = torch.randperm(case.rows)
        for start in range(0, case.rows, case.batch):
            x_BMD[order[start : start + case.batch]].float()


def read_store(store: ActivationStore, case: Case, epoch: int, *, num_ranks: int = 1) -> None:
    """Read every row once as float32 batches, by the ranks in turn."""
    steps = case.shards * case.rows // case.batch
    options = ReadOptions(dtype=torch.float32, num_threads=case.threads)
    for rank in range(num_ranks):
        rows = TrainingRows(store, seed=0, batch_rows=case.batch, rank=rank, num_ranks=num_ranks, options=options)
        for _ in rows.batches(epoch * steps, (epoch + 1) * steps):
            pass


class Clock:
    """Seconds and processor seconds of every contender, one reading per round."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, action: Callable[[], None]) -> None:
        """Measure one contender once."""
        start, cpu_start = time.perf_counter(), time.process_time()
        action()
        self.seconds[name].append(time.perf_counter() - start)
        self.cpu_seconds[name].append(time.process_time() - cpu_start)

    def print_against(self, reference: str, names: list[str], gigabytes: float) -> None:
        """Medians, and the ratio of medians to the reference."""
        base = statistics.median(self.seconds[reference])
        for name in (reference, *names):
            median, cpu = statistics.median(self.seconds[name]), statistics.median(self.cpu_seconds[name])
            print(
                f"  {name:28s} {gigabytes / median:6.2f} GB/s  {base / median:5.2f} x {reference}"
                f"  best {gigabytes / min(self.seconds[name]):6.2f}  processor {cpu / gigabytes:5.2f} s/GB"
            )


def measure(case: Case, folder: Path) -> None:
    """Measure all contenders, round by round, and print the two tables and the sizes."""
    shards = [make_rows(case, seed) for seed in range(case.shards)]
    storage, clock = Storage(str(folder)), Clock()
    raw = folder / "raw"
    raw.mkdir()
    for number in range(case.rounds + 1):
        if number == 1:
            clock = Clock()  # round 0 made the files and warmed the caches
        clock.time("raw write", lambda: write_raw(raw, shards))
        clock.time("describe", lambda: describe(shards))
        for kind in case.compression:
            clock.time(f"write {kind}", partial(write_store, storage, kind, shards, kind))
        clock.time("raw read", lambda: read_raw(raw, case))
        for kind in case.compression:
            store = ActivationStore(storage, kind)
            clock.time(f"first epoch {kind}", partial(read_store, store, case, 0))
            clock.time(f"epoch {kind}", partial(read_store, store, case, 1))
            if kind == NONE:
                clock.time("epoch none, 2 ranks in turn", partial(read_store, store, case, 2, num_ranks=2))
    print(f"write, {case.gigabytes:.2f} GB, medians of {case.rounds} rounds")
    clock.print_against("raw write", [*(f"write {kind}" for kind in case.compression), "describe"], case.gigabytes)
    print("shuffled read into float32 batches")
    names = [name for name in clock.seconds if "epoch" in name]
    clock.print_against("raw read", names, case.gigabytes)
    for kind in case.compression:
        size = sum(shard.num_bytes for shard in ActivationStore(storage, kind).manifest.shards)
        print(f"  {kind:10s} {size / 1e9:.3f} GB on disk")


def describe(shards: list[Rows]) -> None:
    """The work that the stage adds to writing: finiteness, moments, norms."""
    for rows in shards:
        require_finite(rows, "")
        summarise(rows.x_BMD)


def print_memory(case: Case, folder: Path) -> None:
    """Print the memory of a process that writes and reads ten shards, then a hundred. It must not grow."""
    rows = make_rows(case._replace(rows=max(case.batch, case.rows // 5)), 0)
    small = case._replace(rows=len(rows.x_BMD))
    storage = Storage(str(folder))
    for num_shards in (10, 100, 10, 100):
        write_store(storage, "memory", [rows] * num_shards, NONE)
        read_store(ActivationStore(storage, "memory"), small._replace(shards=num_shards), 0)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(f"  {num_shards:3d} shards: {int(status['RssAnon'].split()[0]) / 1024:.0f} MiB beside mapped files")


def main() -> None:
    """Measure and print the case of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=25_000, help="of one shard")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of our reader")
    parser.add_argument("--compression", default=NONE, help="kinds to measure, separated by commas")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parsed = vars(parser.parse_args())
    parent = parsed.pop("folder")
    case = Case(**{**parsed, "compression": tuple(parsed["compression"].split(","))})
    print(f"torch {torch.__version__}, {platform.machine()}, python {platform.python_version()}, {time.strftime('%F')}")
    print(f"{case.shards} shards of {case.rows} rows of {case.models} x {case.dim}, batches of {case.batch}")
    with tempfile.TemporaryDirectory(prefix="crossray-store-", dir=parent) as folder:
        print_memory(case, Path(folder))
        measure(case, Path(folder))


if __name__ == "__main__":
    main()
