"""The contenders of the workers benchmark, each run in its own process by `workers.py`.

Two are the pipeline's own stages on a fresh local Ray cluster of two CPUs. Their throughput excludes the start-up:
shards are timed by the clock of the extraction worker, training steps by the time stamps of the curve. The others run
the same code without Ray and without exchange for a fixed time, to show what the machine gives to one process and to
two at once.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline.cluster.connect import connected
from pipeline.stages import activations
from pipeline.stages.catalogue import ActivationsInputs, FittedCrosscoderInputs
from pipeline.stages.crosscoder_spec import spec_of
from pipeline.stages.extractor import Extractor
from pipeline.stages.finished_crosscoder import CURVES_NAME
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.row_order import ReadOptions, TrainingRows
from pipeline.storage.tables import read_table
from workloads.benchmarks.processes import Watch
from workloads.benchmarks.staged import Stage, stage_of

_TIMES = "times"
"""Folder of the storage root in which workers write their times."""


class TimedShard(activations.ExtractShard):
    """The extraction worker, which also records when it was built and when it was busy."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.built = time.time()

    def __call__(self, planned: activations.PlannedShard) -> activations.ShardDescription:
        """A shard, its times beside it."""
        began = time.time()
        description = super().__call__(planned)
        times = {"worker": f"{id(self)}-{self.built}", "built": self.built, "began": began, "ended": time.time()}
        self.storage.write_json(f"{_TIMES}/{planned.name}.json", {**times, "tokens": description.num_tokens})
        return description


def own_rates(shards: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens per second of all workers together, each from the end of its first shard to the end of its last.

    The first shard of a worker holds the loading of the models and their check. Idle time between shards counts.
    """
    by_worker = defaultdict(list)
    for shard in shards:
        by_worker[shard["worker"]].append(shard)
    rate = 0.0
    for own in by_worker.values():
        own.sort(key=lambda shard: shard["ended"])
        if len(own) > 1:
            rate += sum(shard["tokens"] for shard in own[1:]) / (own[-1]["ended"] - own[0]["ended"])
    return {"rate": rate, "workers": len(by_worker)}


def curve_rate(curve: list[dict[str, float]], batch_rows: int) -> dict[str, float]:
    """Rows per second from the first to the last point of a curve, and when its first step began."""
    first, last = curve[0], curve[-1]
    seconds = (last["time_ms"] - first["time_ms"]) / 1000
    per_step = seconds / (last["step"] - first["step"])
    return {"rate": batch_rows / per_step, "first_step": first["time_ms"] / 1000 - first["step"] * per_step}


def run_stage(path: Path, name: str, after: Callable[[Stage, float], dict[str, float]]) -> dict[str, Any]:
    """Run one stage on a fresh cluster; its seconds, its processor time by role, and the result of `after`."""
    for module in ("ray.data", "ray.train.torch"):
        import_module(module)  # imported first, so that its seconds do not count as start of the cluster
    stage = stage_of(path, name)
    began = time.time()
    with connected(stage.config.resources.cluster, path.with_suffix(".log")):
        started = time.time()
        with Watch() as watch:
            stage.run()
        ended = time.time()
        found = {"ray_init": started - began, "wall": ended - started, **after(stage, started)}
    stage.context.storage.delete(stage.step.folder)
    return {**found, "cpu": watch.cpu_seconds()}


def run_extraction(path: Path) -> dict[str, Any]:
    """Run the activations stage; `pool` is the time from its call until the first worker is built."""

    def after(stage: Stage, called: float) -> dict[str, float]:
        storage = stage.context.storage
        shards = [storage.read_json(f"{_TIMES}/{name}") for name in storage.files(_TIMES)]
        storage.delete(_TIMES)
        tokens = sum(shard["tokens"] for shard in shards)
        first_shards = min(shard["ended"] for shard in shards)
        built = min(shard["built"] for shard in shards)
        return {**own_rates(shards), "pool": built - called, "first_shard": first_shards - called, "items": tokens}

    activations.ExtractShard = TimedShard  # type: ignore[misc, assignment]
    return run_stage(path, ActivationsInputs.NAME, after)


def run_training(path: Path) -> dict[str, Any]:
    """Run the crosscoder stage; `pool` is the time from its call until the first step begins."""

    def after(stage: Stage, called: float) -> dict[str, float]:
        curve = read_table(stage.context.storage, f"{stage.step.folder}/{CURVES_NAME}").to_pylist()
        training = stage.config.training
        found = curve_rate(curve, training.batch_rows)
        return {"rate": found["rate"], "pool": found["first_step"] - called, "items": training.num_rows}

    return run_stage(path, FittedCrosscoderInputs.NAME, after)


def wait_for_start() -> None:
    """Report that everything is loaded, and wait until all contenders are ready."""
    print("ready", flush=True)
    sys.stdin.readline()


def bare_extraction(path: Path, seconds: float) -> dict[str, Any]:
    """Run the code of the extraction worker in this process."""
    torch.set_num_threads(1)
    stage = stage_of(path, ActivationsInputs.NAME)
    inputs = stage.step.inputs
    assert isinstance(inputs, ActivationsInputs)
    section, tokens = inputs.section, inputs.tokens.folder
    index = read_table(stage.context.storage, f"{tokens}/{INDEX_NAME}")
    extractor = Extractor(
        stage.context.storage,
        tokens,
        section=section,
        loading=inputs.loading,
        corpora=sorted(set(index["corpus"].to_pylist())),
        max_rejected=0,
    )
    plan = activations.plan_shards(index, section.rows_per_shard)
    worker = activations.ExtractShard(stage.context.storage, f"bare-{time.time_ns()}", extractor)
    worker(plan[0])
    wait_for_start()
    began, done, number = time.monotonic(), 0, 0
    while time.monotonic() - began < seconds:
        number += 1
        done += worker(plan[number % len(plan)]).num_tokens
    seconds = time.monotonic() - began
    stage.context.storage.delete(worker.folder)
    return {"rate": done / seconds}


def bare_training(path: Path, seconds: float, *, rows_share: int = 1, latents_share: int = 1) -> dict[str, Any]:
    """Run the training loop in this process, on a share of the rows of a batch or of the latents."""
    from dataclasses import replace

    from pipeline.numerics.sparsities.batch_topk import BatchTopK
    from pipeline.numerics.trainer import CrosscoderTrainer

    torch.set_num_threads(1)
    stage = stage_of(path, FittedCrosscoderInputs.NAME)
    inputs = stage.step.inputs
    assert isinstance(inputs, FittedCrosscoderInputs)
    store = ActivationStore(stage.context.storage, inputs.activations.folder)
    training = stage.config.training
    spec = spec_of(
        inputs.section,
        training,
        stage.config.resources.training,
        num_models=store.manifest.num_models,
        activation_dim=store.manifest.activation_dim,
    )
    # Half the latents keep half the pairs, as the ranks of a mesh do together.
    sparsity = BatchTopK(k=max(1, (spec.sparsity.k or 1) // latents_share))
    spec = replace(spec, num_latents=spec.num_latents // latents_share, sparsity=sparsity)
    rows = TrainingRows(
        store,
        seed=0,
        batch_rows=training.batch_rows,
        rank=0,
        num_ranks=rows_share,
        options=ReadOptions(dtype=torch.float32),
    )
    trainer = CrosscoderTrainer(spec)
    batches = rows.batches(0, spec.num_steps)
    for _ in range(2):
        trainer.step(next(batches))
    wait_for_start()
    began, done = time.monotonic(), 0
    for x_BMD in batches:
        trainer.step(x_BMD)
        done += len(x_BMD)
        if time.monotonic() - began >= seconds:
            break
    return {"rate": done / (time.monotonic() - began)}


def make_stages(path: Path, names: list[str]) -> dict[str, Any]:
    """What the measured stage reads; no contender."""
    with connected(stage_of(path, names[0]).config.resources.cluster, path.with_suffix(".log")):
        for name in names:
            stage_of(path, name).run()
    return {}
