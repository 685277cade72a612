"""How a run appears in the tracker: one parent run, and below it one run per step.

Someone who sees only MLflow finds there what was asked (parameters), what came out (metrics, tables, figures, the
report, the models), what was read (corpus, tokens and activation store as datasets, with their fingerprints), and tags
that lead from any number to the artifact that it comes from and to that artifact's inputs. Steps that were finished
before are logged too, marked as reused, so that every run is complete in the tracker.

The run of a crosscoder's step has its settings, its curve and the numbers of every analysis of it, as `stage/name`: the
same names for each crosscoder, so that they can be compared. The parent has the
numbers of the evidence and the counts of the latent tables; its description ends with the verdict table.
"""

import getpass
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.config.run_file import RunConfig
from pipeline.run.flow import AnyStep, Flow
from pipeline.stages.catalogue import (
    ActivationsInputs,
    CorpusInputs,
    EvidenceInputs,
    FittedCrosscoderInputs,
    LatentsInputs,
    OrganismInputs,
    ReportInputs,
    TokensInputs,
)
from pipeline.stages.finished_crosscoder import curve_points, read_curve
from pipeline.storage.artifacts import Record, provenance
from pipeline.storage.filesystem import Storage
from pipeline.storage.repeating import repeating
from pipeline.tracking.tracker import NOTE_TAG, Dataset, Point, Tracker, now_ms

_DATASETS = (CorpusInputs.NAME, TokensInputs.NAME, ActivationsInputs.NAME)
"""Stages whose artifacts are the datasets of what is made from them."""
_DATA_STAGES = (OrganismInputs.NAME, *_DATASETS)
"""Their files are large and stay in the storage; the tracker gets their numbers and their place."""
_CROSSCODER = FittedCrosscoderInputs.NAME
_FIDELITY = ("fidelity/fve_base", "fidelity/fve_chat", "fidelity/l0")
"""Numbers of a latent table that the parent has beside the counts of verdicts."""
_VERDICT = "verdict.txt"
"""The verdict table, a file of the report."""
_NOTE_LETTERS = 7000
"""Of the verdict table in the description: MLflow keeps 8,000 in all."""
_LOAD_SECONDS = 10.0
"""Between two points of the machine's load."""


class RunLog:
    """Tells the tracker of a run. The parent run is opened at once, a step's run with its first number."""

    def __init__(self, tracker: Tracker, config: RunConfig, storage: Storage, flow: Flow) -> None:
        self._tracker = tracker
        self._storage = storage
        self._children: dict[str, str] = {}
        self._num_points: dict[str, int] = {}
        self._finished: set[str] = set()
        self._datasets: dict[str, Dataset] = {}
        self._crosscoders = {own.crosscoder.crosscoder_name for own in flow.crosscoders}
        settings = config.model_dump(mode="json")
        self._note = _note(config, flow)
        tags = {
            "crossray.run_name": config.name,
            "crossray.storage_root": storage.root,
            "crossray.code_version": str(provenance()["code_version"]),
            NOTE_TAG: self._note,
            **_origin(),
        }
        self._parent = tracker.start_run(config.name, tags)
        tracker.log_params(self._parent, settings)
        tracker.log_file(self._parent, "run.json", json.dumps(settings, indent=1, sort_keys=True).encode())

    @property
    def link(self) -> str:
        """Where a person finds the run."""
        return self._tracker.link(self._parent)

    def points(self, step: AnyStep, points: Sequence[Point]) -> None:
        """Values of a step that is still being made."""
        self._tracker.log_points(self._child(step), points)
        self._num_points[step.name] = self._num_points.get(step.name, 0) + len(points)

    def finished(self, step: AnyStep, record: Record, *, reused: bool) -> None:
        """The step's numbers, files and model; its curve too, unless it was already logged live."""
        run = self._child(step)
        stamp = now_ms()
        numbers = numeric(record.counts)
        self._tracker.log_points(run, [Point(name, value, 0, stamp) for name, value in numbers.items()])
        self._tracker.log_params(
            run, {"section": record.identity["section"], "reused": reused, "seconds": record.seconds}
        )
        folder = step.folder
        if step.crosscoder_name and step.key.stage != _CROSSCODER:
            beside = self._children[f"{_CROSSCODER} {step.crosscoder_name}"]
            self._log_numbers(beside, step.key.stage, numbers)
        if step.key.stage == LatentsInputs.NAME and step.crosscoder_name in self._crosscoders:
            shown = {name: value for name, value in numbers.items() if name.startswith("num_") or name in _FIDELITY}
            self._log_numbers(self._parent, step.crosscoder_name, shown)
        if step.key.stage == EvidenceInputs.NAME:
            shown = numbers | {"is_distinguishable": float(record.counts["is_distinguishable"])}
            self._log_numbers(self._parent, EvidenceInputs.NAME, shown)
        if step.key.stage == ReportInputs.NAME:
            verdict = self._storage.read_bytes(f"{folder}/{_VERDICT}").decode()
            self._tracker.log_tags(self._parent, {NOTE_TAG: f"{self._note}\n\n{_quoted(verdict)}"})
        if step.key.stage not in _DATA_STAGES:
            target = self._parent if step.key.stage == ReportInputs.NAME else run
            for name in record.checksums:
                if not name.endswith(".safetensors"):
                    self._tracker.log_file(target, name, self._storage.read_bytes(f"{folder}/{name}"))
        if step.key.stage == _CROSSCODER:
            if not self._num_points.get(step.name):
                curve = read_curve(self._storage, folder)
                self._tracker.log_points(run, [] if curve is None else curve_points(curve.to_pylist()))
            with self._storage.local_folder(folder) as path:
                self._tracker.log_model(run, path, _tags(step, self._storage))
        self._tracker.end_run(run, succeeded=True)
        self._finished.add(step.name)
        if step.key.stage in _DATASETS:
            self._datasets[step.name] = _dataset(step, record, self._storage)
            self._tracker.log_inputs(self._parent, [self._datasets[step.name]])

    def close(self, *, succeeded: bool) -> None:
        """End the parent run (and, after a failure, the steps that were being made)."""
        if not succeeded:
            for name in self._children.keys() - self._finished:
                self._tracker.end_run(self._children[name], succeeded=False)
        self._tracker.end_run(self._parent, succeeded=succeeded)
        self._tracker.close()

    @contextmanager
    def machine_load(self) -> Iterator[None]:
        """For the length of the block, the load of the machine that drives the run, as numbers of the parent."""
        numbers = itertools.count()

        def log() -> None:
            number, load, stamp = next(numbers), self._tracker.machine_load(), now_ms()
            points = [Point(f"system/{name}", value, number, stamp) for name, value in load.items()]
            if points:
                self._tracker.log_points(self._parent, points)

        with repeating(log, seconds=_LOAD_SECONDS, name="machine load"):
            yield

    def _log_numbers(self, run: str, group: str, numbers: Mapping[str, float]) -> None:
        stamp = now_ms()
        self._tracker.log_points(run, [Point(f"{group}/{name}", value, 0, stamp) for name, value in numbers.items()])

    def _child(self, step: AnyStep) -> str:
        if step.name not in self._children:
            tags = _tags(step, self._storage) | _origin()
            self._children[step.name] = self._tracker.start_run(step.name, tags, parent=self._parent)
            read = [self._datasets[own.name] for own in step.inputs.reads().values() if own.name in self._datasets]
            if read:
                self._tracker.log_inputs(self._children[step.name], read)
        return self._children[step.name]


def _tags(step: AnyStep, storage: Storage) -> dict[str, str]:
    inputs = {
        f"crossray.input.{role.replace(' ', '_')}": source.key.fingerprint
        for role, source in step.inputs.reads().items()
    }
    return {
        "crossray.stage": step.key.stage,
        "crossray.fingerprint": step.key.fingerprint,
        "crossray.artifact": storage.url(step.folder),
        **inputs,
    }


def _origin() -> dict[str, str]:
    """Who made a run and with what, where MLflow's pages look for it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        user = str(os.getuid())
    version = str(provenance()["code_version"])
    source = version if version.startswith("crossray") else f"crossray {version}"
    return {"mlflow.user": user, "mlflow.source.name": source, "mlflow.source.type": "LOCAL"}


def _quoted(verdict: str) -> str:
    """The verdict table as Markdown; the end of a very long one is left out."""
    kept = verdict.rstrip()
    if len(kept) > _NOTE_LETTERS:
        kept = kept[:_NOTE_LETTERS].rpartition("\n")[0] + f"\n... (all of it: {_VERDICT})"
    return f"```\n{kept}\n```"


def _dataset(step: AnyStep, record: Record, storage: Storage) -> Dataset:
    """A finished data artifact as a dataset: its rows or documents, and the bytes of all its files."""
    counts = record.counts
    documents = counts.get("num_documents", 0)
    num_rows = counts.get("num_rows", sum(documents.values()) if isinstance(documents, Mapping) else documents)
    folder = step.folder
    num_bytes = counts.get("num_bytes") or sum(storage.size(f"{folder}/{name}") for name in record.checksums)
    profile = {"num_rows": num_rows, "num_bytes": num_bytes} | numeric(counts)
    return Dataset(step.name, step.key.fingerprint, storage.url(folder), profile)


def _note(config: RunConfig, flow: Flow) -> str:
    """The description shown on the run's page."""
    models, layer = flow.data.tokens.inputs.models, flow.data.activations.inputs.section.layer_number
    lines = [
        f"**{models.chat.label}** against **{models.base.label}**, layer {layer}, "
        f"{len(config.crosscoders)} crosscoder(s): {', '.join(section.name for section in config.crosscoders)}.",
        "",
        "The report is the artifact `report.html`; each step is a child run, tagged with its artifact and inputs.",
    ]
    return "\n".join(lines)


def numeric(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers in nested values, by dotted name; NaN and everything that is not a number is left out."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            numbers |= numeric(value, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            numbers[name] = float(value)
    return numbers
