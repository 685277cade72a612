"""Plan and execute: which steps of a flow are there, and the missing ones made in order.

A second run of the same file finds every record and writes nothing. Everything that a run makes or finds is told to the
tracker, so that one MLflow run shows the whole of it.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pipeline.cluster import connect as cluster
from pipeline.config.crosscoder import AdoptedCrosscoderSection
from pipeline.config.run_file import RunConfig
from pipeline.errors import CrossrayError
from pipeline.models.loading import check_pair
from pipeline.planning.sizes import check_space
from pipeline.run.flow import Group, build_flow
from pipeline.stages import activations, adopt, autointerp
from pipeline.stages.base import Context, Step
from pipeline.stages.models import ModelLocation
from pipeline.storage.artifacts import Record, nearest_drift, read_record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Reporter, format_seconds
from pipeline.tracking.choose import make_tracker
from pipeline.tracking.run_log import RunLog
from pipeline.tracking.tracker import Tracker

DONE, PARTIAL, MISSING, STALE = "done", "partial", "missing", "stale"


class StepState(NamedTuple):
    """What is known of a step before anything runs."""

    step: Step
    state: str
    """done, partial (begun, no record), stale (another version of it is there) or missing."""
    drift: list[str]
    """Fields in which a stale step differs from what is there."""
    record: Record | None


class Outcome(NamedTuple):
    """What a run leaves behind."""

    report_path: str
    """Path or URL of the report."""
    verdict: str
    """The verdict table as text."""
    tracking_link: str | None
    """Where the tracker shows the run; None where nothing had to be done."""
    num_made: int
    """Steps that this run made."""
    seconds: float


def inspect(config: RunConfig, storage: Storage) -> list[StepState]:
    """The state of every step, in order. Reads records only."""
    states = []
    for group in build_flow(config):
        for step in group.steps:
            record = read_record(storage, step.key)
            if record is not None:
                states.append(StepState(step, DONE, [], record))
                continue
            drift = nearest_drift(storage, step.key, name=step.name, run_name=config.name)
            begun = bool(storage.files(step.key.folder))
            states.append(StepState(step, PARTIAL if begun else STALE if drift else MISSING, drift, None))
    return states


def run(config: RunConfig, reporter: Reporter, tracker: Tracker | None = None) -> Outcome:
    """Make what is missing and return where the report is; raises InputError before anything is written."""
    started = time.monotonic()
    storage = Storage(config.storage.root)
    flow = build_flow(config)
    missing = [step for group in flow for step in group.steps if read_record(storage, step.key) is None]
    report_step = flow[-1].steps[0]
    if not missing:
        reporter.message(f"{config.name}: all {sum(len(g.steps) for g in flow)} steps are done, nothing was written")
        return _outcome(storage, report_step, None, 0, started)
    check_inputs(config, flow)
    if any(step.key.stage == autointerp.NAME for step in missing):
        autointerp.check(config.resources.autointerp)
    _check_space(config, flow, storage)
    storage.check_writable()
    tracker = tracker or make_tracker(config.tracking, storage, reporter.message)
    log = RunLog(tracker, config, storage, flow)
    reporter.message(f"tracking: {log.link}")
    context = Context(storage, config.resources, reporter, log, config.name, config.tracking.log_every_steps)
    try:
        _execute(config, flow, context, log)
    except BaseException:
        log.close(succeeded=False)
        raise
    log.close(succeeded=True)
    return _outcome(storage, report_step, log.link, len(missing), started)


def render(config: RunConfig, reporter: Reporter) -> Outcome:
    """Render the report again from the artifacts that are there; nothing else is made."""
    started = time.monotonic()
    storage = Storage(config.storage.root)
    group = build_flow(config)[-1]
    unlogged = _NoLive()
    group.run(group.steps, Context(storage, config.resources, reporter, unlogged, config.name, 1))
    return _outcome(storage, group.steps[0], None, 1, started)


class _NoLive:
    def points(self, step: Step, points: Sequence[object]) -> None:
        """Nobody watches."""


def _check_space(config: RunConfig, flow: Sequence[Group], storage: Storage) -> None:
    """Raise an InputError where the store cannot fit the free space, before anything is computed for it."""
    steps = [step for group in flow for step in group.steps]
    found = {step.key.stage: read_record(storage, step.key) for step in steps}
    check_space(config, steps, {stage: record for stage, record in found.items() if record is not None}, storage)


def _execute(config: RunConfig, flow: Sequence[Group], context: Context, log: RunLog) -> None:
    """Run the groups in order; the cluster is started when the first missing step needs it."""
    with ExitStack() as stack:
        is_connected = False
        for group in flow:
            found = {step.name: read_record(context.storage, step.key) for step in group.steps}
            missing = [step for step in group.steps if found[step.name] is None]
            if missing:
                if group.needs_cluster and not is_connected:
                    stack.enter_context(cluster.connected(context.resources.cluster, _log_path(context.storage)))
                    is_connected = True
                if missing[0].key.stage == activations.NAME:
                    _check_space(config, flow, context.storage)  # exact now that the tokens are there
                started = time.monotonic()
                _make(group, missing, context)
                names = ", ".join(step.name for step in missing)
                context.reporter.message(f"{names}: done in {format_seconds(time.monotonic() - started)}")
            for step in group.steps:
                record = found[step.name]
                log.finished(step, record or context.record_of(step), reused=record is not None)


def _make(group: Group, missing: Sequence[Step], context: Context) -> None:
    """Run one group; what a refused input left of a stage that cannot continue from parts is removed."""
    try:
        group.run(missing, context)
    except CrossrayError:
        for step in missing:
            if not group.keeps_parts and read_record(context.storage, step.key) is None:
                context.storage.delete(step.key.folder)
        raise


def _log_path(storage: Storage) -> Path:
    root = Path(storage.root) if storage.is_local else Path("runs").resolve()
    return root / "logs" / "ray.log"


def check_inputs(config: RunConfig, flow: Sequence[Group]) -> None:
    """Raise an InputError for a pair, or an adopted crosscoder, that does not fit, before anything is written.

    The organism's pair fits by construction, apart from the layer, which is checked when it is loaded; its width is
    known, and held against an adopted crosscoder, when it is built.
    """
    step = next(step for group in flow for step in group.steps if step.key.stage == "tokens")
    locations: tuple[ModelLocation, ModelLocation] = step.extra["locations"]
    if not any(location.folder for location in locations):
        pair = check_pair(locations[0].spec, locations[1].spec, layer=config.activations.layer)
        for section in config.crosscoders:
            if isinstance(section, AdoptedCrosscoderSection):
                adopt.read(section, pair.activation_dim)


def _outcome(storage: Storage, report_step: Step, link: str | None, num_made: int, started: float) -> Outcome:
    folder = report_step.key.folder
    return Outcome(
        report_path=storage.url(f"{folder}/report.html"),
        verdict=storage.read_bytes(f"{folder}/verdict.txt").decode(),
        tracking_link=link,
        num_made=num_made,
        seconds=time.monotonic() - started,
    )
