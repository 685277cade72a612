"""All missing crosscoders of a run, fitted in one Ray Train run from one read of the activations.

The rows come from the store, or from extraction as it goes (stages.training_rows). Each rank reads its slice of every
global batch and gives it to one trainer per crosscoder. Checkpoints (all trainers' states, the source's position and
the curves so far) go to the storage root under a name made of the crosscoders' fingerprints, so a killed driver, a
killed worker and a plain re-run all continue from the last one. A finished crosscoder is published in the published
layout, with its curve.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pipeline.cluster import connect as cluster
from pipeline.config.crosscoder import CrosscoderSection, TrainingSection
from pipeline.config.resources import TrainingResources
from pipeline.errors import CrossrayError, InputError
from pipeline.numerics.parallel import Mesh, make_mesh
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from pipeline.schema import TABLE_METADATA
from pipeline.stages.base import Context, Step, find_fault, shown
from pipeline.stages.stream import is_streamed, open_stream, place, publish_rejected, stream_config
from pipeline.stages.training_rows import RowSource, open_rows
from pipeline.storage.activation_store import ActivationStore, Manifest
from pipeline.storage.artifacts import fingerprint_of
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import read_table, write_table
from pipeline.terminal import Progress
from pipeline.tracking.tracker import Point

NAME = "crosscoder"
VERSION = 1

CURVES_NAME = "curves.parquet"
_STATE_NAME = "state.pt"
_CPU_FRAC = 0.75
"""Of the cluster's CPUs for the ranks where nothing else is asked; the rest is for Ray's own processes."""
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""For glibc in the ranks: a step frees and takes blocks of the same few MB over and over, which would go back to the
kernel each time; the fresh pages cost more than the arithmetic on them (workloads/benchmarks/workers_notes.md)."""
CHECKPOINTS = "training"
"""Folder of the storage root for checkpoints; removed when their crosscoders are published."""


def run(steps: Sequence[Step], context: Context) -> None:
    """Fit and publish the crosscoders of `steps`."""
    started = time.monotonic()
    activations = steps[0].inputs["activations"]
    training: TrainingSection = steps[0].extra["training"]
    resources = context.resources.training
    cpus = resources.cpus or _share_of_cpus(resources)
    placement = place(context, cpus) if is_streamed(activations) else None
    cpus = placement.per_trainer if placement else cpus
    fewest = (resources.min_data or resources.data) * resources.latent
    cluster.check_fits("training", cluster.request(resources, cpus), fewest)
    manifest = ActivationStore(context.storage, activations.key.folder).manifest
    group = f"{CHECKPOINTS}/{fingerprint_of(sorted(step.key.fingerprint for step in steps))}"
    job = _job(steps, manifest, context) | {"cpus": cpus}
    dataset = None
    if placement is not None:
        dataset, job["stream"] = open_stream(activations, manifest, context, training, placement)
    progress = Progress(NAME, training.num_steps * training.batch_rows, "rows")
    shown(context, progress, 0, "starting Ray Train")

    def on_event(event: tuple[str, Any]) -> None:
        kind, content = event
        if kind == "points":
            for step, points in zip(steps, content, strict=True):
                context.live.points(step, points)
        else:
            shown(context, progress, content["step"] * training.batch_rows, content["note"])

    with cluster.listening(on_event) as board:
        result = _fit(job | {"board": board}, group, context.storage, dataset)
    about = publish_rejected(job["stream"], steps, context.storage) if job["stream"] is not None else {}
    for step, counts in zip(steps, result, strict=True):
        context.finish(step, counts | about, time.monotonic() - started)
    context.storage.delete(group)


def _share_of_cpus(resources: TrainingResources) -> float:
    """CPUs of a rank where the user names none: its part of the cluster, and no more than one node has."""
    per_rank = cluster.total_cpus() / (resources.data * resources.latent)
    return max(0.5, min(per_rank, cluster.node_cpus()) * _CPU_FRAC)


def _job(steps: Sequence[Step], manifest: Manifest, context: Context) -> dict[str, Any]:
    """What every rank is told."""
    training: TrainingSection = steps[0].extra["training"]
    resources = context.resources.training
    shape = {"num_models": manifest.num_models, "activation_dim": manifest.activation_dim}
    return {
        "storage": context.storage,
        "activations": steps[0].inputs["activations"].key.folder,
        "folders": [step.key.folder for step in steps],
        "specs": [spec_of(_section(step), training, resources, **shape) for step in steps],
        "names": [_section(step).name for step in steps],
        "training": training,
        "resources": resources,
        "num_steps": training.num_steps,
        "log_every_steps": context.log_every_steps,
        "stream": None,
    }


def _section(step: Step) -> CrosscoderSection:
    assert isinstance(step.section, CrosscoderSection)
    return step.section


def spec_of(
    section: CrosscoderSection,
    training: TrainingSection,
    resources: TrainingResources,
    *,
    num_models: int,
    activation_dim: int,
) -> CrosscoderSpec:
    """The plain numbers of a crosscoder for activations of this shape; an InputError where they do not fit."""
    try:
        return CrosscoderSpec(
            num_models=num_models,
            activation_dim=activation_dim,
            num_latents=section.num_latents or (section.expansion or 0) * activation_dim,
            num_steps=training.num_steps,
            precision=training.precision,
            kernels=resources.kernels,
            sparsity=section.sparsity.settings(),
            **asdict(section.settings()),
        )
    except ValueError as error:
        raise InputError(f"crosscoder {section.name!r}: {error}") from error


def _fit(job: Mapping[str, Any], group: str, storage: Storage, dataset: Any | None) -> list[dict[str, Any]]:
    """Run Ray Train until every rank is done; the measured numbers of each crosscoder."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources: TrainingResources = job["resources"]
    parent, name = storage.url(group).rsplit("/", 1)
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=dict(job),
        scaling_config=ScalingConfig(
            num_workers=_num_workers(resources),
            use_gpu=resources.gpus > 0,
            resources_per_worker=cluster.request(resources, job["cpus"]),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=resources.max_restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=resources.checkpoints_kept),
            worker_runtime_env={} if resources.gpus else {"env_vars": KEEP_FREED_MEMORY},
        ),
        datasets={"train": dataset} if dataset is not None else None,
        dataset_config=stream_config(data=resources.data, latent=resources.latent) if dataset is not None else None,
    )
    try:
        result = trainer.fit()
    except Exception as error:
        fault = find_fault(error)
        if fault is None:
            raise
        raise fault from None
    if isinstance(result.return_value, CrossrayError):
        raise result.return_value
    values: list[dict[str, Any]] = result.return_value
    return values


def _num_workers(resources: TrainingResources) -> int | tuple[int, int]:
    """How many ranks Ray Train starts; a range lets it go on while nodes are missing."""
    most = resources.data * resources.latent
    return most if resources.min_data is None else (resources.min_data, most)


def _train_loop(job: dict[str, Any]) -> list[dict[str, Any]] | CrossrayError:
    """One rank. What the user must mend is returned where nobody waits for this rank: Ray would only retry it."""
    try:
        return _train(job)
    except CrossrayError as error:
        if job["resources"].data * job["resources"].latent > 1:
            raise
        return error.with_traceback(None)


def _train(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Read, step, report, checkpoint; rank 0 publishes. Returns each crosscoder's numbers."""
    import ray.train

    resources: TrainingResources = job["resources"]
    world = ray.train.get_context()
    cluster.set_worker_threads(resources.cpus or cluster.local_cpus() / world.get_local_world_size())
    num_ranks = world.get_world_size()  # fewer than asked for while nodes are missing
    mesh = make_mesh(data=num_ranks // resources.latent, latent=resources.latent)
    device = str(ray.train.torch.get_device())
    rows = open_rows(job, mesh, device)
    with _explained(job, first_step=None):
        trainers = [CrosscoderTrainer(spec, device=device, mesh=mesh) for spec in job["specs"]]
    log = _Log(job, is_first=world.get_world_rank() == 0)
    first_step = _restore(trainers, rows, log)
    if first_step == 0:
        x_BMD = rows.warm_up().to(device).float()
        for trainer in trainers:
            trainer.initialise(x_BMD)
    last_step = job["num_steps"]
    with _explained(job, first_step):
        for step, x_BMD in enumerate(rows.batches(first_step, last_step), first_step + 1):
            x_BMD = x_BMD.to(device, non_blocking=True).float()
            for trainer in trainers:
                trainer.step(x_BMD)
            if step % job["log_every_steps"] == 0 or step == last_step:
                log.add(step, [trainer.metrics() for trainer in trainers])
            if step % resources.checkpoint_every_steps == 0 and step < last_step:
                _checkpoint(trainers, rows, step, log, mesh)
    counts = log.publish(trainers)
    ray.train.report({"step": last_step})
    return counts


@contextmanager
def _explained(job: Mapping[str, Any], first_step: int | None) -> Iterator[None]:
    """Turn the trainer's refusals into the user's: settings that cannot run here, and a loss that is not finite."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"crosscoders {', '.join(job['names'])}: {error}") from error
    except FloatingPointError as error:
        every = job["resources"].checkpoint_every_steps
        raise InputError(
            f"crosscoders {', '.join(job['names'])}: {error}; this attempt began at step {first_step}, "
            f"the last good checkpoint is at a multiple of {every} steps"
        ) from error


def _restore(trainers: Sequence[CrosscoderTrainer], rows: RowSource, log: "_Log") -> int:
    """Load the last checkpoint, if there is one; the number of steps that were done."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        rows.restore(None, 0)
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / _STATE_NAME, map_location="cpu", weights_only=True)
    for trainer, own in zip(trainers, state["trainers"], strict=True):
        trainer.load_state_dict(own)
    log.resume(state["curves"])
    rows.restore(state["rows"], int(state["step"]))
    return int(state["step"])


def _checkpoint(trainers: Sequence[CrosscoderTrainer], rows: RowSource, step: int, log: "_Log", mesh: Mesh) -> None:
    """Publish the trainers' states. They do not depend on the mesh, so a run may go on with other ranks.

    Collecting a state is collective over the latent ranks; the first data rank does it, the first of all writes it.
    """
    import ray.train

    states = [trainer.state_dict() for trainer in trainers] if mesh.data_rank == 0 else []
    position = rows.state()
    is_writer = mesh.data_rank == mesh.latent_rank == 0
    with tempfile.TemporaryDirectory(prefix="crossray-checkpoint-") as folder:
        if is_writer:
            state = {"step": step, "trainers": states, "curves": log.curves, "rows": position}
            torch.save(state, Path(folder) / _STATE_NAME)
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if is_writer else None,
            checkpoint_dir_name=f"step-{step:09d}",
        )


class _Log:
    """Curves of all crosscoders: kept for the artifact, sent to the driver as they come."""

    def __init__(self, job: Mapping[str, Any], *, is_first: bool) -> None:
        self.job = job
        self.is_first = is_first
        self.curves: list[list[dict[str, float]]] = [[] for _ in job["specs"]]
        self._last = (time.monotonic(), 0)

    def resume(self, curves: list[list[dict[str, float]]]) -> None:
        """Take over the curves of a checkpoint and tell the driver about them."""
        self.curves = curves
        if self.is_first:
            self._send([_points(own) for own in curves])
            steps = int(curves[0][-1]["step"]) if curves[0] else 0
            self._last = (time.monotonic(), steps)
            self.job["board"].post.remote(("progress", {"step": steps, "note": "resumed"}))

    def add(self, step: int, metrics: Sequence[dict[str, float]]) -> None:
        """One point of every curve."""
        seconds, done = time.monotonic() - self._last[0], step - self._last[1]
        rate = done * self.job["training"].batch_rows / seconds if seconds > 0 else 0.0
        self._last = (time.monotonic(), step)
        stamp = float(cluster.timestamp_ms())
        rows = [{"step": float(step), "time_ms": stamp, **own, "rows_per_second": rate} for own in metrics]
        for curve, row in zip(self.curves, rows, strict=True):
            curve.append(row)
        if self.is_first:
            self._send([_points([row]) for row in rows])
            note = "  ".join(f"{own['loss']:.3f}" for own in metrics)
            self.job["board"].post.remote(("progress", {"step": step, "note": f"loss {note}"}))

    def _send(self, points: list[list[Point]]) -> None:
        self.job["board"].post.remote(("points", points))

    def publish(self, trainers: Sequence[CrosscoderTrainer]) -> list[dict[str, Any]]:
        """Write every crosscoder and its curve (rank 0); the last value of every metric, for the record."""
        storage: Storage = self.job["storage"]
        counts = []
        for trainer, folder, curve, spec in zip(
            trainers, self.job["folders"], self.curves, self.job["specs"], strict=True
        ):
            model = trainer.crosscoder()  # collective where latents are spread over ranks
            if self.is_first:
                with tempfile.TemporaryDirectory(prefix="crossray-model-") as temporary:
                    model.save_pretrained(temporary)
                    storage.upload_folder(Path(temporary), folder)
                table = pa.Table.from_pylist(curve)
                write_table(storage, f"{folder}/{CURVES_NAME}", table, table.schema.with_metadata(TABLE_METADATA))
            last = {f"last_{name}": value for name, value in curve[-1].items() if name not in ("step", "time_ms")}
            counts.append(
                {
                    "num_latents": spec.num_latents,
                    "activation_dim": spec.activation_dim,
                    "num_steps": self.job["num_steps"],
                    "kernels": trainer.kernels.name,
                    "num_rows": self.job["num_steps"] * self.job["training"].batch_rows,
                    **last,
                }
            )
        return counts


def _points(curve: Iterable[Mapping[str, float]]) -> list[Point]:
    return [
        Point(f"train/{name}", value, int(row["step"]), int(row["time_ms"]))
        for row in curve
        for name, value in row.items()
        if name not in ("step", "time_ms")
    ]


def curve_points(storage: Storage, folder: str) -> list[Point]:
    """The whole curve of a finished crosscoder; empty where it was adopted."""
    curve = read_curve(storage, folder)
    return [] if curve is None else _points(curve.to_pylist())


def read_curve(storage: Storage, folder: str) -> pa.Table | None:
    """The training curve of a finished crosscoder: one row per logged step; None where it was adopted."""
    key = f"{folder}/{CURVES_NAME}"
    return read_table(storage, key) if storage.exists(key) else None


@contextmanager
def fitted(storage: Storage, folder: str) -> Iterator[Any]:
    """A finished crosscoder of the storage, for as long as the block."""
    from pipeline.numerics.crosscoder import Crosscoder

    with storage.local_folder(folder) as path:
        yield Crosscoder.from_pretrained(path)
