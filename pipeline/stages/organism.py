"""The generated model pair: built once by pipeline/organisms in a worker process, then an artifact like any other."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster import connect as cluster
from pipeline.config.data import OrganismSection
from pipeline.stages.base import Context, Step, run_task
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Progress

NAME = "organism"
VERSION = 1


def run(steps: Sequence[Step], context: Context) -> None:
    """Build and publish the pair, its texts and its prompts."""
    (step,) = steps
    assert isinstance(step.section, OrganismSection)
    started = time.monotonic()
    meters: dict[str, Progress] = {}

    def on_event(event: tuple[str, int, int]) -> None:
        part, done, total = event
        meter = meters.setdefault(part, Progress(f"{NAME} {part}", total, "steps"))
        context.reporter.progress(meter.update(done))

    num_cpus = cluster.node_cpus() or 1.0  # none where nodes come on demand
    with cluster.listening(on_event) as board:
        counts = run_task(
            _build, context.storage, step.key.folder, step.section.model_dump(mode="json"), board, num_cpus=num_cpus
        )
    context.finish(step, counts, time.monotonic() - started)


def _build(storage: Storage, folder: str, section: dict[str, Any], board: Any) -> dict[str, Any]:
    """Runs in the worker: build in a temporary folder, upload, return the measured behaviour."""
    import torch

    from pipeline.organisms.build import build, spec_of

    torch.set_num_threads(cluster.local_cpus())
    with tempfile.TemporaryDirectory(prefix="crossray-organism-") as temporary:
        out = Path(temporary)
        metrics = build(
            out,
            spec_of(section["size"], seed=section["seed"]),
            lambda part, done, total: board.post.remote((part, done, total)),
        )
        storage.upload_folder(out, folder)
    return dict(metrics)
