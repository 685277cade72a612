"""The generated model pair: built once by organisms/ in a worker process, then an artifact like any other."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.cluster.connect import Board, listening, local_cpus, node_cpus
from pipeline.cluster.pools import run_task
from pipeline.config.data import OrganismSection
from pipeline.organisms.build import build, spec_of
from pipeline.stages.catalogue import OrganismInputs
from pipeline.stages.step import StageContext, Step
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Progress


class _TrainingStep(NamedTuple):
    """Progress that a worker reports."""

    part: str
    done: int
    total: int


def run(steps: Sequence[Step[OrganismInputs]], context: StageContext) -> None:
    """Build and publish the pair, its texts and its prompts."""
    (step,) = steps
    started = time.monotonic()
    meters: dict[str, Progress] = {}

    def on_event(event: _TrainingStep) -> None:
        new = Progress(f"{OrganismInputs.NAME} {event.part}", event.total, "steps")
        context.report_progress(meters.setdefault(event.part, new), event.done)

    num_cpus = node_cpus() or 1.0  # 0 where nodes start on demand
    with listening(on_event) as board:
        counts = run_task(_build, context.storage, step.folder, step.inputs.section, board, num_cpus=num_cpus)
    context.finish(step, counts, time.monotonic() - started)


def _build(storage: Storage, folder: str, section: OrganismSection, board: Board) -> dict[str, Any]:
    """In the worker: build in a temporary folder, upload, return the measured behaviour."""
    torch.set_num_threads(local_cpus())
    with tempfile.TemporaryDirectory(prefix="crossray-organism-") as temporary:
        out = Path(temporary)
        spec = spec_of(**section.model_dump())
        metrics = build(out, spec, lambda part, done, total: board.post(_TrainingStep(part, done, total)))
        storage.upload_folder(out, folder)
    return dict(metrics)
