"""One rank of the fit: reads its slice of every global batch and gives it to one trainer per crosscoder.

Checkpoints hold all trainers' states, the position in the rows and the curves so far; they do not depend on the number
of ranks. Rank 0 sends the curves to the driver and publishes the finished crosscoders. stages/crosscoder.py starts the
ranks.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray.train
import ray.train.torch
import torch

from pipeline.cluster.connect import Board, local_cpus, set_worker_threads
from pipeline.config.crosscoder import CrosscoderSection, TrainingSection
from pipeline.config.resources import TrainingResources
from pipeline.errors import CrossrayError, InputError
from pipeline.numerics import fitting
from pipeline.numerics.crosscoder import Normalisation
from pipeline.numerics.injection import Injection
from pipeline.numerics.parallel import Mesh, make_mesh
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from pipeline.schema import TABLE_METADATA
from pipeline.stages.crosscoder_spec import start_of
from pipeline.stages.finished_crosscoder import CURVES_NAME, curve_points, write_injection
from pipeline.stages.stream import Stream
from pipeline.stages.training_rows import RowSource, open_rows
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import write_table
from pipeline.tracking.tracker import Point, now_ms

_STATE_NAME = "state.pt"


class Fit(NamedTuple):
    """One crosscoder to fit."""

    section: CrosscoderSection
    folder: str
    """Of its artifact."""
    spec: CrosscoderSpec
    normalisation: Normalisation | None
    """Of the rows, in the models' order; None fits raw activations."""
    injection: Injection | None = None
    """What is put into the rows that this crosscoder alone reads."""

    @property
    def name(self) -> str:
        """Of the crosscoder."""
        return self.section.name


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What every rank needs."""

    storage: Storage
    activations_folder: str
    fits: tuple[Fit, ...]
    training: TrainingSection
    resources: TrainingResources
    log_every_steps: int
    board: Board
    """Where rank 0 posts CurvePoints and StepsDone."""
    stream: Stream | None
    """None where the rows come from the store."""


class CurvePoints(NamedTuple):
    """New points of the curves, one list per crosscoder."""

    points: list[list[Point]]


class StepsDone(NamedTuple):
    """How far the fit is."""

    num_steps: int
    note: str


def train_loop(config: dict[str, TrainingJob]) -> list[dict[str, Any]] | CrossrayError:
    """One rank, as Ray Train starts it: the numbers of each crosscoder.

    An error of the user's is returned where no other rank waits for this one, since Ray would repeat the fit after one
    that is raised.
    """
    job = config["job"]
    try:
        return _train(job)
    except CrossrayError as error:
        if job.resources.data * job.resources.latent > 1:
            raise
        return error.with_traceback(None)


def _train(job: TrainingJob) -> list[dict[str, Any]]:
    """Read, step, report, checkpoint; rank 0 publishes. Returns each crosscoder's numbers."""
    resources, last_step = job.resources, job.training.num_steps
    world = ray.train.get_context()
    set_worker_threads(resources.cpus or local_cpus() / world.get_local_world_size())
    num_ranks = world.get_world_size()  # fewer than asked for while nodes are missing
    mesh = make_mesh(data=num_ranks // resources.latent, latent=resources.latent)
    device = str(ray.train.torch.get_device())
    rows = open_rows(job.storage, job.activations_folder, job.training, stream=job.stream, mesh=mesh, device=device)
    with _as_input_errors(job, first_step=None):
        trainers = [
            CrosscoderTrainer(fit.spec, device=device, mesh=mesh, normalisation=fit.normalisation) for fit in job.fits
        ]
    log = _Log(job, is_first=world.get_world_rank() == 0)
    first_step = _restore(trainers, rows, log)
    if first_step == 0:
        with _as_input_errors(job, first_step=None):
            fitting.initialise(trainers, rows.warm_up(), [start_of(fit.section) for fit in job.fits])
    with _as_input_errors(job, first_step):
        batches, injections = rows.batches(first_step, last_step), [fit.injection for fit in job.fits]
        for step in fitting.steps(trainers, batches, first_step=first_step, injections=injections):
            if step % job.log_every_steps == 0 or step == last_step:
                log.add(step, [trainer.metrics() for trainer in trainers])
            if step % resources.checkpoint_every_steps == 0 and step < last_step:
                _checkpoint(trainers, rows, step, log, mesh)
    counts = log.publish(trainers)
    ray.train.report({"step": last_step})
    return counts


@contextmanager
def _as_input_errors(job: TrainingJob, first_step: int | None) -> Iterator[None]:
    """Raise what the trainers refuse as the user's error: settings that cannot run here, and a loss that is not finite.

    first_step: at which this attempt began; None before the first step.
    """
    names = ", ".join(fit.name for fit in job.fits)
    try:
        yield
    except ValueError as error:
        raise InputError(f"crosscoders {names}: {error}") from error
    except FloatingPointError as error:
        raise InputError(
            f"crosscoders {names}: {error}; this attempt began at step {first_step}, the last good checkpoint is at a "
            f"multiple of {job.resources.checkpoint_every_steps} steps"
        ) from error


def _restore(trainers: Sequence[CrosscoderTrainer], rows: RowSource, log: "_Log") -> int:
    """Load the last checkpoint, if there is one; the number of steps that were done."""
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
    """Publish the trainers' states. They do not depend on the mesh, so a run may continue with another number of ranks.

    Collecting a state is collective over the latent ranks; the first data rank does it, the first of all writes it.
    """
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

    def __init__(self, job: TrainingJob, *, is_first: bool) -> None:
        self.job = job
        self.is_first = is_first
        self.curves: list[list[dict[str, float]]] = [[] for _ in job.fits]
        self._last = (time.monotonic(), 0)

    def resume(self, curves: list[list[dict[str, float]]]) -> None:
        """Take over the curves of a checkpoint and tell the driver about them."""
        self.curves = curves
        if self.is_first:
            self.job.board.post(CurvePoints([curve_points(own) for own in curves]))
            steps = int(curves[0][-1]["step"]) if curves[0] else 0
            self._last = (time.monotonic(), steps)
            self.job.board.post(StepsDone(steps, "resumed"))

    def add(self, step: int, metrics: Sequence[dict[str, float]]) -> None:
        """One point of every curve."""
        seconds, done = time.monotonic() - self._last[0], step - self._last[1]
        rate = done * self.job.training.batch_rows / seconds if seconds > 0 else 0.0
        self._last = (time.monotonic(), step)
        stamp = float(now_ms())
        rows = [{"step": float(step), "time_ms": stamp, **own, "rows_per_second": rate} for own in metrics]
        for curve, row in zip(self.curves, rows, strict=True):
            curve.append(row)
        if self.is_first:
            self.job.board.post(CurvePoints([curve_points([row]) for row in rows]))
            losses = "  ".join(f"{fit.name} {own['loss']:.3f}" for fit, own in zip(self.job.fits, metrics, strict=True))
            self.job.board.post(StepsDone(step, f"loss {losses}"))

    def publish(self, trainers: Sequence[CrosscoderTrainer]) -> list[dict[str, Any]]:
        """Write every crosscoder and its curve (rank 0); the last value of every metric, for the record."""
        storage, counts = self.job.storage, []
        for trainer, fit, curve in zip(trainers, self.job.fits, self.curves, strict=True):
            model = trainer.crosscoder()  # collective where latents are spread over ranks
            if self.is_first:
                with tempfile.TemporaryDirectory(prefix="crossray-model-") as temporary:
                    model.save_pretrained(temporary)
                    storage.upload_folder(Path(temporary), fit.folder)
                if fit.injection is not None:
                    write_injection(storage, fit.folder, fit.injection)
                table = pa.Table.from_pylist(curve)
                write_table(storage, f"{fit.folder}/{CURVES_NAME}", table, table.schema.with_metadata(TABLE_METADATA))
            num_steps = self.job.training.num_steps
            counts.append(
                {
                    "num_latents": fit.spec.num_latents,
                    "activation_dim": fit.spec.activation_dim,
                    "num_steps": num_steps,
                    "kernels": trainer.kernels.name,
                    "num_rows": num_steps * self.job.training.batch_rows,
                    **{f"last_{name}": value for name, value in curve[-1].items() if name not in ("step", "time_ms")},
                }
            )
        return counts
