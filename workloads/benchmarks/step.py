"""Time of one training step, compared with a dense reference trainer and with the encoder's matrix product alone.

    python -m workloads.benchmarks.step --dim 512 --latents 16384 --k 64 --rows 1024
    python -m workloads.benchmarks.step --device cuda --precision bfloat16 --dim 2304 --latents 73728 --k 100 \
        --rows 2048,4096,8192

Each contender runs in its own process, so each has its own peak memory. The reference follows the formulas directly:
scores of all codes, flattened top k, dense decode, autograd's dense gradients, clipping and unfused Adam. Activations
are sums of planted directions, so codes are as sparse as in training. Readings with machine and date are kept in
step_notes.md.
"""

import argparse
import math
import multiprocessing
import platform
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer

MIB = 1 << 20
PARTS = ("encoder product", "collect", "decode", "value_gradients", "weight_gradients", "latent_sums", "adam")
"""Parts of our step that are timed separately. The rest is the exact selection, losses and bookkeeping."""


class Case(NamedTuple):
    """One size on one device."""

    device: str
    precision: Literal["float32", "tf32", "bfloat16"]
    kind: str
    models: int
    dim: int
    latents: int
    k: int
    rows: int
    steps: int
    threads: int


class Reading(NamedTuple):
    """What one contender measured."""

    seconds: float
    """Median per step."""
    best_seconds: float
    mean_seconds: float
    cpu_seconds: float
    """Median processor time per step, all threads. With one thread on a busy machine, this is the fairest number."""
    peak_bytes: int
    """Peak memory above that before the trainer existed: parameters, gradients, Adam and the memory of a step."""
    parts: dict[str, float]
    """Mean seconds per step of named parts; empty for contenders that are not split."""


def make_rows(case: Case, seed: int) -> Tensor:
    """x_BMD: every row is a sum of about k / 2 of F / 4 planted directions, with noise."""
    generator = torch.Generator(case.device).manual_seed(seed)
    width = case.models * case.dim
    count = max(case.latents // 4, 8)
    concepts = torch.randn(count, width, generator=torch.Generator(case.device).manual_seed(0), device=case.device)
    picks = torch.randint(count, (case.rows, max(case.k // 2, 1)), generator=generator, device=case.device)
    strengths = torch.rand(picks.shape, generator=generator, device=case.device)
    x_BN = torch.nn.functional.embedding_bag(picks, concepts, mode="sum", per_sample_weights=strengths)
    noise = torch.randn(x_BN.shape, generator=generator, device=case.device)
    return (x_BN + 0.3 * noise).div_(math.sqrt(case.k)).view(case.rows, case.models, case.dim)


class DenseReference:
    """The reference: the step as the formulas write it, with autograd."""

    def __init__(self, case: Case) -> None:
        self.case = case
        width = case.models * case.dim
        direction = torch.nn.functional.normalize(torch.randn(case.latents, case.dim, device=case.device), dim=1)
        W_dec_FN = direction.repeat(1, case.models)
        self.W_enc_NF = torch.nn.Parameter(W_dec_FN.T.contiguous())
        self.W_dec_FN = torch.nn.Parameter(W_dec_FN)
        self.b_enc_F = torch.nn.Parameter(torch.zeros(case.latents, device=case.device))
        self.b_dec_N = torch.nn.Parameter(torch.zeros(width, device=case.device))
        self.parameters = [self.W_enc_NF, self.b_enc_F, self.W_dec_FN, self.b_dec_N]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4, foreach=False, fused=False)

    def step(self, x_BMD: Tensor) -> None:
        """Forward, backward, clip, Adam."""
        case = self.case
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bfloat16"):
            f_BF = torch.relu(x_BMD.flatten(1) @ self.W_enc_NF + self.b_enc_F)
            w_F = self.W_dec_FN.view(case.latents, case.models, case.dim).norm(dim=2).sum(1)
            if case.kind == "batch_topk":
                score_BF = (f_BF * w_F).detach()
                kept = score_BF.flatten().topk(case.k * case.rows, sorted=False).indices
                f_BF = f_BF * torch.zeros_like(score_BF).flatten().index_fill_(0, kept, 1).view_as(score_BF)
            xh_BMD = (f_BF @ self.W_dec_FN + self.b_dec_N).view_as(x_BMD)
            loss = (x_BMD - xh_BMD).norm(dim=2).mean()
            if case.kind == "l1":
                loss = loss + 0.04 * (f_BF * w_F).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


class Timer:
    """Sums the time of wrapped calls, with CUDA events if there is a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.spans: dict[str, list[Any]] = defaultdict(list)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under a name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            result = function(*args, **kwargs)
            self.spans[name].append((start, self._mark()))
            return result

        return timed

    def seconds(self) -> dict[str, float]:
        """Total seconds per name."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return {name: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for name, spans in self.spans.items()}
        return {name: sum(b - a for a, b in spans) for name, spans in self.spans.items()}

    def _mark(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def measure(case: Case, make_step: Callable[[], Callable[[Tensor], None]], timer: Timer | None = None) -> Reading:
    """Medians over case.steps after three steps of warm-up."""
    batches = [make_rows(case, seed) for seed in range(4)]
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # from here on the peak is what is allocated now, or more
    before = memory(case)
    step = make_step()
    for warm_up in range(3):
        step(batches[warm_up])
    if timer is not None:
        timer.spans.clear()
    seconds, cpu_seconds = [], []
    for index in range(case.steps):
        synchronize(case)
        start, cpu_start = time.perf_counter(), time.process_time()
        step(batches[index % 4])
        synchronize(case)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    parts = {} if timer is None else {name: total / case.steps for name, total in timer.seconds().items()}
    return Reading(
        statistics.median(seconds),
        min(seconds),
        statistics.fmean(seconds),
        statistics.median(cpu_seconds),
        memory(case) - before,
        parts,
    )


def memory(case: Case) -> int:
    """Peak bytes of this process so far."""
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize(case: Case) -> None:
    """Wait for the GPU."""
    if case.device == "cuda":
        torch.cuda.synchronize()


def run_encoder(case: Case) -> Reading:
    """Only x W_enc + b_enc, into preallocated memory."""
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    W_FN = torch.randn(case.latents, case.models * case.dim, device=case.device, dtype=dtype)
    bias_F, out_BF = W_FN.new_zeros(case.latents), W_FN.new_empty(case.rows, case.latents)

    def step(x_BMD: Tensor) -> None:
        torch.addmm(bias_F, x_BMD.flatten(1).to(dtype), W_FN.T, out=out_BF)

    return measure(case, lambda: step)


def run_dense(case: Case) -> Reading:
    """The reference trainer."""
    return measure(case, lambda: DenseReference(case).step)


def run_ours(case: Case) -> Reading:
    """CrosscoderTrainer with its parts timed."""
    timer = Timer(case.device)

    def make_step() -> Callable[[Tensor], None]:
        trainer = CrosscoderTrainer(spec_of(case), device=case.device)
        encoder, kernels = trainer._encoder, trainer.kernels
        encoder._preactivations = timer.wrap("encoder product", encoder._preactivations)  # type: ignore[method-assign]
        trainer._adam.update = timer.wrap("adam", trainer._adam.update)  # type: ignore[method-assign]
        for name in PARTS[1:-1]:
            setattr(kernels, name, timer.wrap(name, getattr(kernels, name)))
        return trainer.step

    return measure(case, make_step, timer)


def spec_of(case: Case) -> CrosscoderSpec:
    """The settings that `run_ours` trains. No latent dies within a benchmark."""
    return CrosscoderSpec(
        num_models=case.models,
        activation_dim=case.dim,
        num_latents=case.latents,
        num_steps=10_000,
        sparsity=L1(mu=0.04) if case.kind == "l1" else BatchTopK(k=case.k),
        precision=case.precision,
        lr_warmup_steps=0,
    )


def contend(case: Case, runner: Callable[[Case], Reading], results: Any) -> None:
    """Child process of one contender."""
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = case.precision != "float32"
    torch.manual_seed(0)
    results.put(runner(case))


def in_own_process(case: Case, runner: Callable[[Case], Reading]) -> Reading:
    """A contender's reading from a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=contend, args=(case, runner, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"expected {runner.__name__} to finish for {case}, got exit code {process.exitcode}")
    reading: Reading = results.get()
    return reading


def print_comparison(case: Case, readings: dict[str, Reading]) -> None:
    """The table of one case."""
    ours, dense, encoder = readings["ours"], readings["dense"], readings["encoder"]
    size = f"M={case.models} D={case.dim} F={case.latents} k={case.k} B={case.rows}"
    print(f"\n{case.kind} {size} {case.device} {case.precision}, {case.steps} steps, medians (best)")
    for name, reading in readings.items():
        print(
            f"  {name:8s} {reading.seconds * 1e3:9.1f} ms ({reading.best_seconds * 1e3:.1f})"
            f"  cpu {reading.cpu_seconds * 1e3:8.1f} ms"
            f"  {case.rows / reading.seconds:10.0f} rows/s  peak {reading.peak_bytes / MIB:8.0f} MiB"
        )
    for name in ("seconds", "best_seconds", "cpu_seconds"):
        our, reference, product = (getattr(reading, name) for reading in (ours, dense, encoder))
        print(f"  by {name}: dense / ours {reference / our:.2f}, ours / encoder {our / product:.2f}")
    state = 4 * 4 * (2 * case.latents * case.models * case.dim + case.latents + case.models * case.dim)
    share = (ours.peak_bytes - state) / (4 * case.rows * case.latents)
    print(f"  ours beyond parameters, gradients and Adam ({state / MIB:.0f} MiB): {share:.2f} B F floats")
    timed = sum(ours.parts.values())
    for name, seconds in {**ours.parts, "rest": ours.mean_seconds - timed}.items():
        print(f"    {name:18s} {seconds * 1e3:8.2f} ms  {100 * seconds / ours.mean_seconds:5.1f} %")


def parse() -> list[Case]:
    """Cases from the command line, one per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"])
    parser.add_argument("--kind", default="batch_topk", choices=["batch_topk", "l1"])
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rows", default="1024", help="rows per step; several separated by commas")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parsed = vars(parser.parse_args())
    rows = [int(number) for number in parsed.pop("rows").split(",")]
    return [Case(rows=number, **parsed) for number in rows]


def main() -> None:
    """Measure and print every case."""
    print(f"torch {torch.__version__}, {platform.machine()}, python {platform.python_version()}, {time.strftime('%F')}")
    runners = {"encoder": run_encoder, "dense": run_dense, "ours": run_ours}
    for case in parse():
        print_comparison(case, {name: in_own_process(case, runner) for name, runner in runners.items()})


if __name__ == "__main__":
    main()
