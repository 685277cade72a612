"""All missing crosscoders of a run, fitted in one Ray Train run from one read of the activations.

Where resources.training.fits_at_a_time says so, a few at a time, each group with a read of its own.

The rows come from the store, or from extraction as it goes (stages/stream.py). What each rank does is in
stages/training.py. Checkpoints go to the storage root under a name made of the crosscoders' fingerprints, so a killed
driver, a killed worker and a plain re-run all continue from the last one. A finished crosscoder is published in the
published layout, with its curve.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray.data

from pipeline.analyses.power import strengths_of
from pipeline.cluster.connect import check_fits, interruptible, listening, node_cpus, request, total_cpus
from pipeline.cluster.pools import find_fault
from pipeline.config.crosscoder import InjectedCrosscoderSection
from pipeline.config.resources import TrainingResources
from pipeline.errors import CrossrayError
from pipeline.numerics.injection import Injection, directions
from pipeline.schema import CHAT, Split
from pipeline.stages.catalogue import FittedCrosscoderInputs
from pipeline.stages.crosscoder_spec import check_start_of, normalisation_of, spec_of, start_of
from pipeline.stages.step import StageContext, Step
from pipeline.stages.stream import open_stream, place, publish_rejected, stream_config
from pipeline.stages.training import CurvePoints, Fit, StepsDone, TrainingJob, train_loop
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import fingerprint_of
from pipeline.terminal import Progress

CHECKPOINTS = "training"
"""Folder of the storage root for checkpoints; removed when their crosscoders are published."""
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""For glibc in the ranks: a step frees and takes blocks of the same few MB over and over, which would go back to the
kernel each time; the fresh pages cost more than the arithmetic on them (workloads/benchmarks/workers_notes.md)."""
_CPU_FRAC = 0.75
"""Of the cluster's CPUs for the ranks where nothing else is asked; the rest is for Ray's own processes."""


def run(steps: Sequence[Step[FittedCrosscoderInputs]], context: StageContext) -> None:
    """Fit and publish the crosscoders of `steps`, all from one read or as many at a time as resources allow."""
    at_a_time = context.resources.training.fits_at_a_time or len(steps)
    for first in range(0, len(steps), at_a_time):
        _fit_together(steps[first : first + at_a_time], context)


def _fit_together(steps: Sequence[Step[FittedCrosscoderInputs]], context: StageContext) -> None:
    started = time.monotonic()
    # All crosscoders of a run share the training section and the activations.
    training, activations = steps[0].inputs.training, steps[0].inputs.activations
    resources = context.resources.training
    cpus = resources.cpus or _share_of_cpus(resources)
    placement = place(context, cpus) if activations.inputs.section.mode == "stream" else None
    cpus = placement.per_trainer if placement else cpus
    fits = _fits(steps, context)
    check_fits("training", request(resources, cpus), (resources.min_data or resources.data) * resources.latent)
    dataset = stream = None
    if placement is not None:
        dataset, stream = open_stream(activations, context, training, placement)
    progress = Progress(FittedCrosscoderInputs.NAME, training.num_steps * training.batch_rows, "rows")
    context.report_progress(progress, 0, "starting Ray Train")

    def on_event(event: CurvePoints | StepsDone) -> None:
        if isinstance(event, StepsDone):
            context.report_progress(progress, event.num_steps * training.batch_rows, event.note)
        else:
            for step, points in zip(steps, event.points, strict=True):
                context.curves.points(step, points)

    group = f"{CHECKPOINTS}/{fingerprint_of(sorted(step.key.fingerprint for step in steps))}"
    with listening(on_event) as board:
        job = TrainingJob(
            storage=context.storage,
            activations_folder=activations.folder,
            fits=fits,
            training=training,
            resources=resources,
            log_every_steps=context.log_every_steps,
            board=board,
            stream=stream,
        )
        result = _fit(job, group, cpus, dataset)
    about = publish_rejected(stream, steps, context.storage) if stream is not None else {}
    for step, counts in zip(steps, result, strict=True):
        context.finish(step, counts | about, time.monotonic() - started)
    context.storage.delete(group)


def _share_of_cpus(resources: TrainingResources) -> float:
    """CPUs of a rank where the user names none: its part of the cluster, and no more than one node has."""
    per_rank = total_cpus() / (resources.data * resources.latent)
    return max(0.5, min(per_rank, node_cpus()) * _CPU_FRAC)


def _fits(steps: Sequence[Step[FittedCrosscoderInputs]], context: StageContext) -> tuple[Fit, ...]:
    """What is fitted, with the shape of the activations."""
    store = ActivationStore(context.storage, steps[0].inputs.activations.folder)
    fits = []
    for step in steps:
        spec = spec_of(
            step.inputs.section,
            step.inputs.training,
            context.resources.training,
            num_models=store.manifest.num_models,
            activation_dim=store.manifest.activation_dim,
        )
        section = step.inputs.section
        start = start_of(section)
        check_start_of(section, spec, start)
        injection = _injection(section, store) if isinstance(section, InjectedCrosscoderSection) else None
        normalisation = normalisation_of(section, store.manifest, start)
        fits.append(Fit(section, step.folder, spec, normalisation, injection))
    return tuple(fits)


def _injection(section: InjectedCrosscoderSection, store: ActivationStore) -> Injection:
    """The planted concepts of a crosscoder: directions between rows of the first validation shard."""
    power = section.power
    assert power is not None, "an injected crosscoder is made of a section with it"
    norm_C = strengths_of(power.num_concepts, power.strengths) * store.manifest.training_rms_M()[CHAT]
    x_BMD = store.read(store.manifest.of_split(Split.VALIDATION)[0]).x_BMD
    return Injection(directions(x_BMD[:, CHAT], norm_C=norm_C, seed=power.seed), power.frequency, power.seed)


def _fit(job: TrainingJob, group: str, cpus: float, dataset: ray.data.Dataset | None) -> list[dict[str, Any]]:
    """Run Ray Train until every rank is done; the measured numbers of each crosscoder."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = job.resources
    parent, name = job.storage.url(group).rsplit("/", 1)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=_num_workers(resources),
            use_gpu=resources.gpus > 0,
            resources_per_worker=request(resources, cpus),
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
        with interruptible():
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
    """How many ranks Ray Train starts; a range lets it continue while nodes are missing."""
    most = resources.data * resources.latent
    return most if resources.min_data is None else (resources.min_data, most)
