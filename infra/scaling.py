"""Where time and bytes go on 1 to 1,000 GPUs: `python infra/scaling.py` prints the tables of SCALING.md.

Two stages run one after the other: extraction (compute, writing, the driver's work per shard) and training (compute,
Adam's memory traffic, exchange between ranks, reading). A stage takes as long as its slowest resource, and the name of
that resource says what saturates first. Each constant says where it comes from: a benchmark of this project, a data
sheet, or a provider's published limit.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.planning.rates import ADAM_BYTES, GPU_SHARE, GPUS, STEP_OVER_ENCODER


class Constants(NamedTuple):
    """Rates and fixed costs. The GPUs of a node share its network."""

    gpu_flops: float = GPUS["H100"].bfloat16
    """Data sheet."""
    gpu_share: float = GPU_SHARE.value
    """Of it that forward passes and training steps reach: assumed; no GPU has been measured."""
    memory_bytes_per_second: float = 3.35e12
    """Memory of a GPU, data sheet of an H100. It limits Adam."""
    link_bytes_per_second: float = 450e9
    """Between the GPUs of a node, data sheet of NVLink 4, one direction."""
    network_bytes_per_second: float = 25e9
    """Network of a node, 200 Gbit/s."""
    store_bytes_per_second: float = 100e9
    """Object store, per account and region: the order of magnitude that providers publish."""
    store_requests_per_second: float = 3500
    """PUT requests per prefix, a provider's published limit."""
    gpus_per_node: int = 8
    step_factor: float = STEP_OVER_ENCODER.value
    """A training step over its encoder product: measured on a CPU (step_notes.md, one thread)."""
    adam_bytes: float = ADAM_BYTES.value
    """Moved per parameter and step."""
    pack_bytes_per_second: float = 0.55e9
    """One core checks, hashes and writes shards this fast: measured (store_notes.md)."""
    cores_per_gpu: int = 8
    driver_seconds_per_shard: float = 0.008
    """Driver time per result of a worker: measured (workloads/benchmarks/driver_items.py, 1,220 results)."""
    start_seconds: float = 30.0
    """Start of cluster, pools and Ray Train: measured, about 5 + 6 + 14 s, rounded up."""


class Pair(NamedTuple):
    """Two models of one size and the crosscoder on them."""

    name: str
    width: int
    layers: int
    parameters_per_layer: float
    expansion: int

    @property
    def num_latents(self) -> int:
        """F."""
        return self.expansion * self.width


PAIRS = (
    Pair("2B", 2304, 13, 78e6, 32),
    Pair("9B", 3584, 21, 198e6, 32),
    Pair("70B", 8192, 40, 856e6, 16),
)
"""Gemma-2-2b, Gemma-2-9b and Llama-3.1-70B, each up to its middle layer."""
NUM_MODELS = 2
ROWS = 100_000_000
EPOCHS = 2
BATCH_ROWS = 2048
ROWS_PER_SHARD = 50_000


class Stage(NamedTuple):
    """Seconds that each resource is busy in one stage."""

    name: str
    busy: dict[str, float]

    @property
    def seconds(self) -> float:
        """Time of the slowest resource."""
        return max(self.busy.values())

    @property
    def bound(self) -> str:
        """Name of the slowest resource."""
        return max(self.busy, key=lambda name: self.busy[name])


def extraction(pair: Pair, num_gpus: int, rows: int, c: Constants) -> Stage:
    """Both models run up to layer L on all GPUs, and every row is written once."""
    num_nodes = -(-num_gpus // c.gpus_per_node)
    flops = 2 * NUM_MODELS * pair.parameters_per_layer * pair.layers * rows
    num_bytes = rows * NUM_MODELS * pair.width * 2
    num_shards = rows / ROWS_PER_SHARD
    return Stage(
        "extraction",
        {
            "GPU compute": flops / (num_gpus * c.gpu_flops * c.gpu_share),
            "packing on CPUs": num_bytes / (num_gpus * c.cores_per_gpu * c.pack_bytes_per_second),
            "network of nodes": num_bytes / (num_nodes * c.network_bytes_per_second),
            "object store": max(num_bytes / c.store_bytes_per_second, 2 * num_shards / c.store_requests_per_second),
            "driver": num_shards * c.driver_seconds_per_shard,
        },
    )


def training(pair: Pair, num_gpus: int, rows: int, c: Constants) -> Stage:
    """One crosscoder: latents are divided within a node, rows over nodes, and batches stay at BATCH_ROWS.

    Latent ranks sum partial reconstructions (B M D numbers per step); data ranks exchange dense gradients.
    """
    latent = min(num_gpus, c.gpus_per_node)
    data = max(1, num_gpus // latent)
    steps = rows * EPOCHS / BATCH_ROWS
    encoder = 2 * BATCH_ROWS * NUM_MODELS * pair.width * pair.num_latents
    parameters = 2 * NUM_MODELS * pair.width * pair.num_latents
    exchanged = BATCH_ROWS / data * NUM_MODELS * pair.width * 4
    gradients = parameters / latent * 4
    read = rows * EPOCHS * NUM_MODELS * pair.width * 2
    return Stage(
        "training",
        {
            # On one GPU these follow each other: the products, then Adam over all weights.
            "GPU": steps * c.step_factor * encoder / (data * latent * c.gpu_flops * c.gpu_share)
            + steps * c.adam_bytes * parameters / latent / c.memory_bytes_per_second,
            "links in a node": steps * 2 * exchanged * (latent - 1) / latent / c.link_bytes_per_second,
            "network of nodes": (
                steps * 2 * gradients * latent * (data - 1) / data / c.network_bytes_per_second
                + read / (data * c.network_bytes_per_second)
            ),
            "object store": read / c.store_bytes_per_second,
        },
    )


def training_gpus(pair: Pair, num_gpus: int, rows: int, c: Constants) -> int:
    """The number of GPUs with which training is fastest; more only add communication."""
    candidates = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= num_gpus]
    return min(candidates, key=lambda n: training(pair, n, rows, c).seconds)


def table(rows: int, c: Constants) -> str:
    """One line per pair and number of GPUs."""
    lines = [
        "| pair | GPUs | store | extraction | bound by | training (GPUs used) | bound by | total |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        for num_gpus in (1, 8, 64, 1000):
            first = extraction(pair, num_gpus, rows, c)
            used = training_gpus(pair, num_gpus, rows, c)
            second = training(pair, used, rows, c)
            total = c.start_seconds + first.seconds + second.seconds
            terabytes = rows * NUM_MODELS * pair.width * 2 / 1e12
            lines.append(
                f"| {pair.name} | {num_gpus:,} | {terabytes:.2f} TB | {duration(first.seconds)} | {first.bound} | "
                f"{duration(second.seconds)} ({used}) | {second.bound} | {duration(total)} |"
            )
    return "\n".join(lines)


def largest_rows(pair: Pair, num_gpus: int, seconds: float, c: Constants) -> dict[str, float]:
    """Rows that each resource of extraction could process in the given time."""
    busy = extraction(pair, num_gpus, ROWS, c).busy
    return {name: ROWS * seconds / own for name, own in busy.items()}


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of the run")
    parser.add_argument(
        "--gpu-share", type=float, default=Constants().gpu_share, help="share of the data sheet's FLOP/s"
    )
    parsed = parser.parse_args(arguments)
    constants = Constants(gpu_share=parsed.gpu_share)
    print(table(parsed.rows, constants))
    print()
    print("| rows in an hour of extraction on 1,000 GPUs, 9B pair | |\n|---|---|")
    for name, rows in sorted(largest_rows(PAIRS[1], 1000, 3600, constants).items(), key=lambda item: item[1]):
        print(f"| {name} | {rows / 1e9:,.1f} billion |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
