"""The runs of a run file: which steps are there, and the way to make the missing ones.

A second run of the same file finds every record and writes nothing. What is missing is made by execution.py, which
imports torch and Ray and is therefore loaded only where something is to be done.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.run.advice import advice
from pipeline.run.flow import AnyStep, build_flow, build_layers_flow
from pipeline.run.layer_count import renumbering_note
from pipeline.stages.step import StageContext
from pipeline.storage.artifacts import Record, nearest_drift, read_record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Reporter
from pipeline.tracking.choose import deliver_waiting
from pipeline.tracking.tracker import Point, Tracker

DONE, PARTIAL, MISSING, STALE = "done", "partial", "missing", "stale"


class StepState(NamedTuple):
    """What is known of a step before anything runs."""

    step: AnyStep
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
    """The state of every step, in order. Reads records only. InputError where the layer is yet to be measured."""
    states = []
    for step in build_flow(with_measured_layer(config, storage)).steps:
        record = read_record(storage, step.key)
        if record is not None:
            states.append(StepState(step, DONE, [], record))
            continue
        drift = nearest_drift(storage, step.key, name=step.name, run_name=config.name)
        begun = bool(storage.files(step.folder))
        states.append(StepState(step, PARTIAL if begun else STALE if drift else MISSING, _told(drift), None))
    return states


def _told(drift: Sequence[str]) -> list[str]:
    """The fields that differ; of other inputs their names alone, since those steps tell their own fields."""
    fields = [line for line in drift if not line.startswith("inputs.")]
    roles = dict.fromkeys(line.removeprefix("inputs.").partition(":")[0] for line in drift if line not in fields)
    return fields + ([f"reads other artifacts: {', '.join(roles)}"] if roles else [])


def notes(config: RunConfig, storage: Storage) -> list[str]:
    """What a user should know before the run: lines for `plan` and for the start of `run`."""
    note = renumbering_note(build_flow(with_measured_layer(config, storage)).data.activations, config.name, storage)
    return [*([note] if note else []), *advice(config)]


def run(config: RunConfig, reporter: Reporter, tracker: Tracker | None = None) -> Outcome:
    """Make what is missing and return where the report is; raises InputError before anything is written."""
    started = time.monotonic()
    storage = Storage(config.storage.root)
    config = with_layer(config, reporter)
    flow = build_flow(config)
    num_missing = sum(read_record(storage, step.key) is None for step in flow.steps)
    link = None
    if num_missing:
        for note in notes(config, storage):
            reporter.message(note)
        from pipeline.run.execution import execute

        link = execute(config, flow, storage, reporter, tracker)
    else:
        reporter.message(f"{config.name}: all {len(flow.steps)} steps are done, nothing was written")
        if tracker is None:
            deliver_waiting(config.tracking, storage, reporter.message)
    return _outcome(storage, flow.report, link, num_missing, started)


def render(config: RunConfig, reporter: Reporter) -> Outcome:
    """Render the report again from the artifacts that are there; nothing else is made."""
    started = time.monotonic()
    storage = Storage(config.storage.root)
    flow = build_flow(with_layer(config, reporter))
    context = StageContext(storage, config.resources, reporter, Unlogged(), config.name, log_every_steps=1)
    flow.groups[-1].run([flow.report], context)
    return _outcome(storage, flow.report, None, 1, started)


def track(config: RunConfig, reporter: Reporter, tracker: Tracker | None = None) -> str:
    """Log a finished run to its tracker; where that shows it. InputError where a step is missing."""
    from pipeline.run.execution import track as log_all

    storage = Storage(config.storage.root)
    return log_all(config, build_flow(with_measured_layer(config, storage)), storage, reporter, tracker)


class LayerCurve(NamedTuple):
    """What `crossray layers` prints."""

    table: str
    layer: int | None
    """From 0; None where no layer can be named."""
    reason: str
    folder: str
    """Path or URL of the artifact."""


def layers(config: RunConfig, reporter: Reporter) -> LayerCurve:
    """The curve over layers, measured if it is not there yet."""
    from pipeline.run.execution import measure_layers
    from pipeline.stages.layers import choice_of, curve_text

    storage, flow = Storage(config.storage.root), build_layers_flow(config)
    context = StageContext(storage, config.resources, reporter, Unlogged(), config.name, log_every_steps=1)
    measure_layers(flow, context)
    choice = choice_of(flow.layers, context)
    return LayerCurve(curve_text(flow.layers, storage), choice.layer, choice.reason, storage.url(flow.layers.folder))


def with_layer(config: RunConfig, reporter: Reporter) -> RunConfig:
    """The run file with a number for activations.layer: auto, measured if it is not there yet.

    Raises InputError where no layer can be named.
    """
    storage = Storage(config.storage.root)
    known = with_measured_layer(config, storage)
    if known.activations.layer == "auto":
        layers(config, reporter)
        known = with_measured_layer(config, storage)
    if config.activations.layer == "auto":
        reporter.message(f"activations.layer: auto is {known.activations.layer}, as `crossray layers` names it")
    return known


def with_measured_layer(config: RunConfig, storage: Storage) -> RunConfig:
    """The run file with a number for activations.layer: auto if the curve over layers is there; nothing is made.

    Raises InputError where the curve names no layer.
    """
    if config.activations.layer != "auto":
        return config
    record = read_record(storage, build_layers_flow(config).layers.key)
    if record is None:
        return config
    if record.counts["layer"] is None:
        raise InputError(f"activations.layer: auto: {record.counts['reason']}")
    activations = config.activations.model_copy(update={"layer": record.counts["layer"]})
    return config.model_copy(update={"activations": activations})


class Unlogged:
    """A listener to curves that keeps nothing."""

    def points(self, step: AnyStep, points: Sequence[Point]) -> None:
        """Nothing."""


def _outcome(storage: Storage, report: AnyStep, link: str | None, num_made: int, started: float) -> Outcome:
    return Outcome(
        report_path=storage.url(f"{report.folder}/report.html"),
        verdict=storage.read_bytes(f"{report.folder}/verdict.txt").decode(),
        tracking_link=link,
        num_made=num_made,
        seconds=time.monotonic() - started,
    )
