"""Makes the missing steps of a run in order, and logs everything that is made or found.

The cluster is started where a missing step needs it. Whatever can be refused is refused before anything is computed
(checks.py). Imported only where something is to be done: a finished run does without it.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pipeline.cluster.connect import connected
from pipeline.config.resources import ResourcesSection
from pipeline.config.run_file import RunConfig
from pipeline.errors import CrossrayError, InputError
from pipeline.planning.remarks import slow_dtype
from pipeline.planning.sizes import check_space
from pipeline.run.checks import check_halves, check_local_resources, check_models, check_organism, check_resources
from pipeline.run.flow import AnyStep, Flow, Group, LayersFlow
from pipeline.stages.autointerp import endpoint_options
from pipeline.stages.step import StageContext
from pipeline.storage.artifacts import Record, read_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.locks import locked
from pipeline.terminal import Reporter, format_seconds
from pipeline.tracking.choose import make_tracker
from pipeline.tracking.run_log import RunLog
from pipeline.tracking.tracker import Tracker

_log = logging.getLogger(__name__)


def execute(config: RunConfig, flow: Flow, storage: Storage, reporter: Reporter, tracker: Tracker | None) -> str:
    """Make what is missing; where the tracker shows the run. Raises InputError before anything is written."""
    missing = [step for step in flow.steps if read_record(storage, step.key) is None]
    check_local_resources(missing, config.resources)
    loading, adopted = flow.data.activations.inputs.loading, [own.crosscoder for own in flow.crosscoders]
    check_models(loading, adopted, address=config.resources.cluster.address)
    check_organism(missing, config.activations.layer_number)
    if any(own.autointerp in missing for own in flow.crosscoders):
        endpoint_options(config.resources.autointerp)
    _check_space(config, flow, storage)
    storage.check_writable()
    if slow := slow_dtype(config, missing):
        reporter.message(slow)
    with ExitStack() as stack:
        _connect(stack, flow.groups, missing, storage, config.resources, reporter)
        log = RunLog(tracker or make_tracker(config.tracking, storage, reporter.message), config, storage, flow)
        reporter.message(f"tracking: {log.link}")
        context = StageContext(storage, config.resources, reporter, log, config.name, config.tracking.log_every_steps)
        try:
            with storage.kept(), log.machine_load():
                _make_groups(config, flow, context, log)
        except BaseException:
            log.close(succeeded=False)
            raise
        log.close(succeeded=True)
    return log.link


def track(config: RunConfig, flow: Flow, storage: Storage, reporter: Reporter, tracker: Tracker | None) -> str:
    """Log a finished run, all of its steps as reused; where the tracker shows it. InputError where a step is missing.

    With MLflow this makes a further run of the same name: what was logged before is left as it is.
    """
    found = {step.name: read_record(storage, step.key) for step in flow.steps}
    missing = [name for name, record in found.items() if record is None]
    if missing:
        raise InputError(
            f"{config.name}: expected a finished run, {len(missing)} of {len(found)} steps are missing, the first is "
            f"{missing[0]!r}; finish it with `crossray run`, which logs it too"
        )
    if tracker is None and config.tracking.kind == "none":
        raise InputError("tracking.kind: expected a tracker to log to, got none; add --set tracking.kind=mlflow")
    log = RunLog(tracker or make_tracker(config.tracking, storage, reporter.message), config, storage, flow)
    try:
        _log_finished(log, flow.steps, found)
    except BaseException:
        log.close(succeeded=False)
        raise
    log.close(succeeded=True)
    return log.link


def _log_finished(log: RunLog, steps: Sequence[AnyStep], found: Mapping[str, Record | None]) -> None:
    for step in steps:
        record = found[step.name]
        assert record is not None
        log.finished(step, record, reused=True)


def measure_layers(flow: LayersFlow, context: StageContext) -> None:
    """Make what is missing of the curve over layers; a later run finds it, and logs what it uses of it."""
    storage, resources = context.storage, context.resources
    missing = [step for group in flow.groups for step in group.steps if read_record(storage, step.key) is None]
    check_local_resources(missing, resources)
    check_models(flow.layers.inputs.loading, address=resources.cluster.address)
    storage.check_writable()
    with ExitStack() as stack:
        _connect(stack, flow.groups, missing, storage, resources, context.reporter)
        for group in flow.groups:
            own = [step for step in group.steps if step in missing]
            if not own:
                continue
            started = time.monotonic()
            _make(group, own, context)
            names = ", ".join(step.name for step in own)
            context.reporter.message(f"{names}: done in {format_seconds(time.monotonic() - started)}")


def _connect(
    stack: ExitStack,
    groups: Sequence[Group],
    missing: Sequence[AnyStep],
    storage: Storage,
    resources: ResourcesSection,
    reporter: Reporter,
) -> None:
    """Join the cluster where a missing step needs it, and check there what can be checked before anything is made."""
    if any(group.needs_cluster and any(step in missing for step in group.steps) for group in groups):
        reporter.message("cluster: connecting to Ray")
        stack.enter_context(connected(resources.cluster, _log_path(storage)))
        check_resources(missing, resources)
        check_halves(missing, storage, resources, reporter)


def _check_space(config: RunConfig, flow: Flow, storage: Storage) -> None:
    """Raise an InputError where the activation store cannot fit the free space."""
    found = {step.key.stage: read_record(storage, step.key) for step in flow.steps}
    records = {stage: record for stage, record in found.items() if record is not None}
    check_space(config, flow.data, records, storage)


def _make_groups(config: RunConfig, flow: Flow, context: StageContext, log: RunLog) -> None:
    """Run the groups in order."""
    for number, group in enumerate(flow.groups, 1):
        found = {step.name: read_record(context.storage, step.key) for step in group.steps}
        missing = [step for step in group.steps if found[step.name] is None]
        if missing:
            if flow.data.activations in missing:
                _check_space(config, flow, context.storage)  # exact now that the tokens are there
            context.reporter.step(number, len(flow.groups))
            started = time.monotonic()
            _make(group, missing, context)
            names = ", ".join(step.name for step in missing)
            _log.info("%s: made in %.1f s", names, time.monotonic() - started)
            context.reporter.message(f"{names}: done in {format_seconds(time.monotonic() - started)}")
        for step in group.steps:
            record = found[step.name]
            log.finished(step, record or context.record_of(step), reused=record is not None)


def _make(group: Group, missing: Sequence[AnyStep], context: StageContext) -> None:
    """Run one group; after a refusal, what it has left is removed unless a later run can continue from it.

    Its artifacts are locked meanwhile: what another run has finished just before is there now, and is left as it is.
    """
    with locked(context.storage, [step.folder for step in missing], context.run_name):
        missing = [step for step in missing if read_record(context.storage, step.key) is None]
        try:
            if missing:
                group.run(missing, context)
        except CrossrayError:
            for step in missing:
                if not group.keeps_parts and read_record(context.storage, step.key) is None:
                    context.storage.delete(step.folder)
            raise


def _log_path(storage: Storage) -> Path:
    root = Path(storage.root) if storage.is_local else Path("runs").resolve()
    return root / "logs" / "ray.log"
