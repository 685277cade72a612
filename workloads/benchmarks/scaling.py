"""The cost of Latent Scaling of all latents, compared with encoding the same rows once, and its memory.

    python -m workloads.benchmarks.scaling                       # F=8192, D=256, 64 active latents, 16,384 rows
    python -m workloads.benchmarks.scaling --rows 16384,131072   # peak memory at 1x and 8x the rows

Each number of rows is measured in its own process. Encoding, decoding and adding a batch take turns, so a busy machine
slows all of them alike. With --threads 1, processor time is the fairest number. Latent Scaling here means everything
between the codes of a batch and the table with the intervals of all ratios. The memory must not grow with the rows.
Readings with machine and date are kept in scaling_notes.md.
"""

import argparse
import multiprocessing
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.rows import RowBatch, Sums
from pipeline.numerics.crosscoder import Crosscoder

MIB = 1 << 20
BATCH_ROWS = 4096
ROWS_PER_DOCUMENT = 64


class Case(NamedTuple):
    """One size."""

    dim: int
    latents: int
    k: int
    rows: int
    groups: int
    resamples: int
    threads: int


class Reading(NamedTuple):
    """What one process measured."""

    seconds: dict[str, float]
    """Total of each part."""
    cpu_seconds: dict[str, float]
    """The same in processor time, all threads."""
    peak_bytes: int
    """Peak memory above what the process held before the first batch."""
    active: float
    """Mean active latents per row."""


def make_crosscoder(case: Case) -> Crosscoder:
    """A random BatchTopK dictionary whose encoder is its decoder."""
    crosscoder = Crosscoder(case.latents, 2, case.dim, activation="batch_topk", k=case.k)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        W_FMD = torch.randn(case.latents, 2, case.dim, generator=generator) / case.dim**0.5
        crosscoder.W_dec_FMD.copy_(W_FMD)
        crosscoder.W_enc_FMD.copy_(W_FMD / 2)
        # The threshold that keeps k latents a row, from the scores of a few rows.
        x_BN = make_rows(case, crosscoder, 256, seed=1 << 20).flatten(1)
        score_BF = (x_BN @ crosscoder.W_enc_FMD.flatten(1).T) * crosscoder.code_weights_F()
        crosscoder.threshold.fill_(float(score_BF.flatten().topk(case.k * 256).values[-1]))
    return crosscoder


def make_rows(case: Case, crosscoder: Crosscoder, num_rows: int, seed: int) -> Tensor:
    """x_BMD: sums of k / 2 of the dictionary's directions, with noise."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(case.latents, (num_rows, max(case.k // 2, 1)), generator=generator)
    strengths = 1 + torch.rand(picks.shape, generator=generator)
    table_FN = crosscoder.W_dec_FMD.detach().flatten(1)
    x_BN = torch.nn.functional.embedding_bag(picks, table_FN, mode="sum", per_sample_weights=strengths)
    return (x_BN + 0.1 * torch.randn(x_BN.shape, generator=generator)).view(num_rows, 2, case.dim)


class Clock:
    """Sums wall-clock and processor time by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a block under a name."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] += time.perf_counter() - start
        self.cpu_seconds[name] += time.process_time() - cpu_start


def measure(case: Case) -> Reading:
    """Time of each part over all rows, batch by batch. Making the batches is not timed."""
    torch.set_num_threads(case.threads)
    crosscoder = make_crosscoder(case)
    analysis = LatentScaling(crosscoder, num_groups=case.groups, num_resamples=case.resamples)
    add_batch(case, crosscoder, analysis, analysis.start(), Clock(), index=-1)  # a warm-up
    before = peak_bytes()
    sums, clock = analysis.start(), Clock()
    num_batches = case.rows // BATCH_ROWS
    num_pairs = sum(add_batch(case, crosscoder, analysis, sums, clock, index=index) for index in range(num_batches))
    with clock.part("intervals"):
        analysis.table(sums)
    return Reading(dict(clock.seconds), dict(clock.cpu_seconds), peak_bytes() - before, num_pairs / case.rows)


def add_batch(
    case: Case, crosscoder: Crosscoder, analysis: LatentScaling, sums: Sums, clock: Clock, *, index: int
) -> int:
    """Encodes, decodes and adds one batch of rows; the number of active pairs."""
    x_BMD = make_rows(case, crosscoder, BATCH_ROWS, seed=index + 1)
    doc_id_B = (torch.arange(BATCH_ROWS) + (index + 1) * BATCH_ROWS) // ROWS_PER_DOCUMENT
    zeros_B = torch.zeros(BATCH_ROWS, dtype=torch.int32)
    with clock.part("encode"):
        codes = crosscoder.encode(x_BMD)
    with clock.part("decode"):
        reconstruction_BMD = crosscoder.decode(codes)
    batch = RowBatch(x_BMD, codes, reconstruction_BMD, zeros_B, doc_id_B, zeros_B, zeros_B, zeros_B)
    with clock.part("sums"):
        analysis.update(sums, batch)
    return codes.num_pairs


def peak_bytes() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(case: Case) -> Reading:
    """A reading from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        reading: Reading = pool.apply(measure, (case,))
    return reading


def print_reading(case: Case, reading: Reading) -> None:
    """Print the parts of one case, and the ratio of Latent Scaling to encoding."""
    size = f"D={case.dim} F={case.latents} rows={case.rows} active={reading.active:.1f}"
    print(f"\n{size} groups={case.groups} resamples={case.resamples} threads={case.threads}")
    for name, value in reading.seconds.items():
        print(f"  {name:10s} {value:8.3f} s  {case.rows / value:12.0f} rows/s  cpu {reading.cpu_seconds[name]:8.3f} s")
    for unit, taken in (("wall clock", reading.seconds), ("processor time", reading.cpu_seconds)):
        ratio = (taken["sums"] + taken["intervals"]) / taken["encode"]
        print(f"  Latent Scaling / encoding {ratio:.2f} by {unit}, all ratios with intervals included")
    print(f"  peak memory above the start {reading.peak_bytes / MIB:.0f} MiB")


def parse() -> list[Case]:
    """Cases from the command line, one per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rows", default="16384", help="validation rows; several separated by commas")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parsed: dict[str, Any] = vars(parser.parse_args())
    rows = [int(number) for number in parsed.pop("rows").split(",")]
    return [Case(rows=number, **parsed) for number in rows]


def main() -> None:
    """Measure and print every case."""
    print(f"torch {torch.__version__}, {platform.machine()}, python {platform.python_version()}, {time.strftime('%F')}")
    for case in parse():
        print_reading(case, in_own_process(case))


if __name__ == "__main__":
    main()
