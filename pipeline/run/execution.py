"""Makes the missing steps of a run in order, and logs everything that is made or found.

The cluster is started when the first missing step needs it. Whatever can be refused is refused before anything is
written. Imported only where something is to be done: a finished run does without it.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from pipeline.cluster.connect import connected
from pipeline.config.run_file import RunConfig
from pipeline.errors import CrossrayError
from pipeline.models.loading import check_pair
from pipeline.planning.sizes import check_space
from pipeline.run.flow import AnyStep, Flow, Group, LayersFlow
from pipeline.stages.adopt import read_checkpoint
from pipeline.stages.autointerp import endpoint_options
from pipeline.stages.catalogue import AdoptedCrosscoderInputs
from pipeline.stages.models import model_spec
from pipeline.stages.step import StageContext
from pipeline.storage.artifacts import read_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.locks import locked
from pipeline.terminal import Reporter, format_seconds
from pipeline.tracking.choose import make_tracker
from pipeline.tracking.run_log import RunLog
from pipeline.tracking.tracker import Tracker

_log = logging.getLogger(__name__)


def execute(config: RunConfig, flow: Flow, storage: Storage, reporter: Reporter, tracker: Tracker | None) -> str:
    """Make what is missing; where the tracker shows the run. Raises InputError before anything is written."""
    _check_models(flow)
    asked = [own.autointerp for own in flow.crosscoders if own.autointerp is not None]
    if any(read_record(storage, step.key) is None for step in asked):
        endpoint_options(config.resources.autointerp)
    _check_space(config, flow, storage)
    storage.check_writable()
    log = RunLog(tracker or make_tracker(config.tracking, storage, reporter.message), config, storage, flow)
    reporter.message(f"tracking: {log.link}")
    context = StageContext(storage, config.resources, reporter, log, config.name, config.tracking.log_every_steps)
    try:
        _make_groups(config, flow, context, log)
    except BaseException:
        log.close(succeeded=False)
        raise
    log.close(succeeded=True)
    return log.link


def measure_layers(flow: LayersFlow, context: StageContext) -> None:
    """Make what is missing of the curve over layers; a later run finds it, and logs what it uses of it."""
    context.storage.check_writable()
    with ExitStack() as stack:
        is_connected = False
        for group in flow.groups:
            missing = [step for step in group.steps if read_record(context.storage, step.key) is None]
            if not missing:
                continue
            if group.needs_cluster and not is_connected:
                stack.enter_context(connected(context.resources.cluster, _log_path(context.storage)))
                is_connected = True
            started = time.monotonic()
            _make(group, missing, context)
            names = ", ".join(step.name for step in missing)
            context.reporter.message(f"{names}: done in {format_seconds(time.monotonic() - started)}")


def _check_models(flow: Flow) -> None:
    """Raise an InputError for a pair, or an adopted crosscoder, that does not fit.

    The organism's pair fits by construction, apart from the layer, which is checked when it is loaded; its width is
    known, and compared with an adopted crosscoder's, when it is built.
    """
    loading = flow.data.activations.inputs.loading
    if any(location.folder for location in loading.models):
        return
    base, chat = (model_spec(location) for location in loading.models)
    pair = check_pair(base, chat, layer=loading.layer)
    for own in flow.crosscoders:
        if isinstance(own.crosscoder.inputs, AdoptedCrosscoderInputs):
            read_checkpoint(own.crosscoder.inputs.section, pair.activation_dim)


def _check_space(config: RunConfig, flow: Flow, storage: Storage) -> None:
    """Raise an InputError where the activation store cannot fit the free space."""
    found = {step.key.stage: read_record(storage, step.key) for step in flow.steps}
    records = {stage: record for stage, record in found.items() if record is not None}
    check_space(config, flow.data, records, storage)


def _make_groups(config: RunConfig, flow: Flow, context: StageContext, log: RunLog) -> None:
    """Run the groups in order; the cluster is started when the first missing step needs it."""
    with ExitStack() as stack:
        is_connected = False
        for number, group in enumerate(flow.groups, 1):
            found = {step.name: read_record(context.storage, step.key) for step in group.steps}
            missing = [step for step in group.steps if found[step.name] is None]
            if missing:
                if group.needs_cluster and not is_connected:
                    stack.enter_context(connected(context.resources.cluster, _log_path(context.storage)))
                    is_connected = True
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
