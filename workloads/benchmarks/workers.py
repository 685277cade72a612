"""Two workers of one thread each against one: extraction and training with the pipeline's own stages.

    python -m workloads.benchmarks.workers                         # both parts, three rounds, about 20 minutes
    python -m workloads.benchmarks.workers --parts training --repeats 5

It builds random pairs (extraction: D=256, 8 layers; training: D=512, F=8192) and runs the stages on fresh local Ray
clusters of two CPUs, each contender once per round. It prints medians: throughput without start-up (by the clocks of
the workers), wall clock with start-up, the start-up of Ray, of the Ray Data pool and of Ray Train, and the processor
time by role. For reference it runs the same code in bare processes without Ray and without exchange, one and two at
once; two of them show the most that the cores can give. Readings with machine and date are kept in workers_notes.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pipeline.stages.crosscoder import KEEP_FREED_MEMORY
from workloads.benchmarks.processes import ROLES
from workloads.benchmarks.staged import build_inputs, write_run_file


class Case(NamedTuple):
    """Sizes. With the defaults a contender takes about twenty seconds."""

    extraction_width: int = 256
    layers: int = 8
    shards: int = 24
    shard_tokens: int = 3000
    training_width: int = 512
    latents: int = 8192
    k: int = 64
    batch_rows: int = 2048
    steps: int = 40
    stored_rows: int = 16_384
    bare_seconds: float = 10.0
    copies: int = 12
    """Copies of the organism's documents, enough for both parts."""


class Contender(NamedTuple):
    """One way to do the work."""

    name: str
    function: str
    """Function of workers_contenders."""
    file: str
    """Name of the run file."""
    processes: int = 1
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    adds_up: bool = True
    """Whether the rates of the processes are summed. Latent ranks work on the same rows, so theirs are not."""


def contenders(case: Case, only: Sequence[str] | None = None) -> dict[str, list[Contender]]:
    """By part, all or those named `only`.

    The first of a part is what the others are compared with, bare ones with the first bare one.
    """
    seconds = {"seconds": case.bare_seconds}
    every = {
        "extraction": [
            Contender("1 worker", "run_extraction", "extraction-1"),
            Contender("2 workers", "run_extraction", "extraction-2"),
            Contender("bare: 1 process", "bare_extraction", "extraction-1", 1, seconds),
            Contender("bare: 2 processes", "bare_extraction", "extraction-1", 2, seconds),
        ],
        "training": [
            Contender("1 rank", "run_training", "training-1-1"),
            Contender("2 data ranks", "run_training", "training-2-1"),
            Contender("2 latent ranks", "run_training", "training-1-2"),
            Contender("bare: 1 process", "bare_training", "training-1-1", 1, seconds),
            Contender("bare: 2 processes", "bare_training", "training-1-1", 2, seconds),
            Contender("bare: 2, half the rows", "bare_training", "training-1-1", 2, {**seconds, "rows_share": 2}),
            Contender(
                "bare: 2, half the latents", "bare_training", "training-1-1", 2, {**seconds, "latents_share": 2}, False
            ),
        ],
    }
    return {part: [own for own in of_part if only is None or own.name in only] for part, of_part in every.items()}


def prepare(folder: Path, case: Case, parts: Sequence[str]) -> dict[str, Path]:
    """Models, corpus and run files; then the stages before the measured one."""
    files = {}
    resources: dict[str, Any] = {"cluster": {"num_cpus": 2}}
    if "extraction" in parts:
        build_inputs(folder / "extraction", width=case.extraction_width, layers=case.layers, copies=case.copies)
        for workers in (1, 2):
            name = f"extraction-{workers}"
            settings: dict[str, Any] = {
                "tokens": {"num_tokens": case.shards * case.shard_tokens},
                "activations": {"layer": case.layers - 2, "rows_per_shard": case.shard_tokens},
                "resources": {**resources, "extraction": {"workers": workers, "cpus": 1}},
            }
            files[name] = write_run_file(folder / "extraction", name, settings)
        in_process("make_stages", files["extraction-1"], {"names": ["corpus", "tokens"]})
    if "training" in parts:
        build_inputs(folder / "training", width=case.training_width, copies=case.copies)
        for data, latent in ((1, 1), (2, 1), (1, 2)):
            name = f"training-{data}-{latent}"
            sparsity = {"kind": "batch_topk", "k": case.k}
            training = {"data": data, "latent": latent, "cpus": 1, "checkpoint_every_steps": 1_000_000}
            settings = {
                "tokens": {"num_tokens": case.stored_rows},
                "activations": {"layer": 0, "rows_per_shard": max(1, case.stored_rows // 4)},
                "crosscoders": [{"name": "fit", "num_latents": case.latents, "sparsity": sparsity}],
                "training": {"batch_rows": case.batch_rows, "num_rows": case.steps * case.batch_rows},
                "resources": {**resources, "training": training},
            }
            files[name] = write_run_file(folder / "training", name, settings)
        in_process("make_stages", files["training-1-1"], {"names": ["corpus", "tokens", "activations"]})
    return files


def in_process(function: str, path: Path, arguments: dict[str, Any], processes: int = 1) -> list[dict[str, Any]]:
    """The results of a function of workers_contenders in fresh processes. Those that wait start together."""
    call = f"contenders.{function}(Path({str(path)!r}), **{arguments!r})"
    code = (
        "import json; from pathlib import Path; from workloads.benchmarks import workers_contenders as contenders; "
        f"print('result ' + json.dumps({call}), flush=True)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | (KEEP_FREED_MEMORY if function == "bare_training" else {})
    running = [subprocess.Popen(command, text=True, env=env, **pipes) for _ in range(processes)]
    results: dict[int, dict[str, Any]] = {}
    for number, process in enumerate(running):
        read_until(process, ("ready", "result "), results, number)
    for process in running:
        if process.poll() is None and process.stdin is not None:
            process.stdin.write("\n")
            process.stdin.flush()
    for number, process in enumerate(running):
        if number not in results:
            read_until(process, ("result ",), results, number)
        process.wait()
    return [results[number] for number in range(processes)]


def read_until(
    process: "subprocess.Popen[str]", beginnings: tuple[str, ...], results: dict[int, dict[str, Any]], number: int
) -> None:
    """Read a contender's lines up to one with this beginning, and put its result into `results`."""
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("result "):
            results[number] = json.loads(line.removeprefix("result "))
        if line.startswith(beginnings):
            return
    raise RuntimeError(f"a contender ended without a result:\n{process.stderr.read()[-4000:]}")


def reading_of(contender: Contender, files: dict[str, Path]) -> dict[str, Any]:
    """One reading of a contender."""
    found = in_process(contender.function, files[contender.file], contender.arguments, contender.processes)
    rates = [own["rate"] for own in found]
    return {**found[0], "rate": sum(rates) if contender.adds_up else sum(rates) / len(rates)}


def run(
    case: Case,
    parts: Sequence[str],
    repeats: int,
    say: Callable[[str], None] = print,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All readings by part and contender, or those named `only`, printed at the end of every part."""
    readings: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory(prefix="crossray-workers-") as name:
        files = prepare(Path(name), case, parts)
        for part in parts:
            own = readings[part] = defaultdict(list)
            for number in range(repeats):
                for contender in contenders(case, only)[part]:
                    own[contender.name].append(reading_of(contender, files))
                    say(f"{part}, round {number + 1}: {contender.name} {own[contender.name][-1]['rate']:.1f}/s")
            say(table(part, own))
    return readings


def middle(readings: Sequence[dict[str, Any]], name: str) -> float:
    """Median of one number."""
    return median([float(reading[name]) for reading in readings])


def ratio(readings: dict[str, list[dict[str, Any]]], name: str, to: str) -> float:
    """Median over the rounds of one contender's rate divided by another's in the same round."""
    pairs = zip(readings[name], readings[to], strict=True)
    return median([float(own["rate"] / other["rate"]) for own, other in pairs])


def table(part: str, readings: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds, as Markdown."""
    unit = {"extraction": "tokens", "training": "rows"}[part]
    first, bare = (next((n for n in readings if n.startswith("bare") == is_bare), "") for is_bare in (False, True))
    lines = [
        f"\n| {part} | {unit}/s | ratio | ray.init | until the first {'call' if part == 'extraction' else 'step'} "
        f"| wall clock | {unit}/s with start-up | processor seconds: {', '.join(ROLES)} |",
        "|---" * 8 + "|",
    ]
    for name, own in readings.items():
        cells = [name, f"{middle(own, 'rate'):.0f}", f"{ratio(readings, name, bare if 'bare' in name else first):.2f}"]
        if name.startswith("bare"):
            cells += [""] * 5
        else:
            whole = [reading["items"] / (reading["ray_init"] + reading["wall"]) for reading in own]
            cells += [f"{middle(own, key):.1f} s" for key in ("ray_init", "pool", "wall")] + [f"{median(whole):.0f}"]
            cells.append(", ".join(f"{median(reading['cpu'][role] for reading in own):.1f}" for role in ROLES))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("extraction", "training"), default=["extraction", "training"])
    parser.add_argument("--repeats", type=int, default=3)
    names = sorted({contender.name for part in contenders(Case()).values() for contender in part})
    parser.add_argument("--only", nargs="+", choices=names, help="of a part; the first is what others are compared to")
    for name, default in Case._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args())
    parts, repeats, only = given.pop("parts"), given.pop("repeats"), given.pop("only")
    run(Case(**given), parts, repeats, lambda line: print(line, flush=True), only)


if __name__ == "__main__":
    main()
