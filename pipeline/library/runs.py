"""A finished run from Python: its crosscoders and tables, found by the run's name; and a whole run in one call.

The report reads every artifact of its run, so its record names them all. Reading loads neither Ray nor MLflow.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from pipeline.analyses.latent_sets import require_latents
from pipeline.config.presets import with_preset
from pipeline.config.run_file import RunConfig, load, validated
from pipeline.errors import ArtifactError, InputError
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.dashboard import Dashboard
from pipeline.library.fitting import reporting
from pipeline.library.origin import ModelOrigin, Origin
from pipeline.library.rows import Rows
from pipeline.library.summary import CrosscoderSummary, Summary, crosscoder_summary
from pipeline.report.data import CrosscoderReport
from pipeline.schema import TABLE_METADATA, Split
from pipeline.stages.finished_crosscoder import open_crosscoder, read_curve
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import RECORD_NAME, Record, parse_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import read_part, table_columns
from pipeline.terminal import Reporter

_REPORT, _CROSSCODER = "report", "crosscoder"


class _Found(NamedTuple):
    """A report's record and when it was written."""

    created: str
    record: Record


def open_run(root: str | Path, name: str) -> "Run":
    """The run of this name below a storage root; the newest one where settings were changed under one name.

    Args:
        root: the run file's storage.root: a folder or a URL.
        name: the run's name.

    Raises InputError where no finished run has this name.
    """
    storage = Storage(str(root))
    found = [record for record in _reports(storage) if record.record.identity["section"]["name"] == name]
    if not found:
        names = sorted({str(own.record.identity["section"]["name"]) for own in _reports(storage)})
        known = f"those there: {', '.join(names)}" if names else "there is none"
        raise InputError(f"{storage.root}: expected a finished run {name!r}, got none of this name; {known}")
    return Run(storage, max(found, key=lambda own: own.created).record)


def run(config: RunConfig | str | Path | Mapping[str, Any], *, progress: bool | Reporter = True) -> "Run":
    """Makes what is missing of a run, as `crossray run` does, and opens it.

    Args:
        config: a run file, its content as a mapping, or a RunConfig.
        progress: shows the steps on standard error; or a reporter of your own.

    Raises InputError, before anything is written, for what cannot be run.
    """
    from pipeline.run import runner

    if isinstance(config, str | Path):
        config = load(Path(config))
    elif not isinstance(config, RunConfig):
        config = validated(RunConfig, with_preset(config), "run")
    with reporting(progress) as reporter:
        runner.run(config, reporter)
    return open_run(config.storage.root, config.name)


class Run:
    """A finished run; nothing is read before it is asked for."""

    def __init__(self, storage: Storage, report: Record) -> None:
        """report: the record of the run's report."""
        self.storage = storage
        self.name = str(report.identity["section"]["name"])
        """Of the run."""
        self.crosscoders: tuple[str, ...] = tuple(report.identity["section"]["crosscoders"])
        """Names of its crosscoders."""
        self.created = str(report.provenance.get("created", ""))
        """When its report was written, ISO 8601."""
        self.labels: tuple[str, str] = (str(report.counts.get("base", "")), str(report.counts.get("chat", "")))
        """The base and the chat model, as the report names them; empty in reports of version 0.1."""
        self.folder = f"{report.stage}/{report.fingerprint}"
        """Of its report, below the storage root."""
        self._inputs: dict[str, str] = report.identity["inputs"]

    def __repr__(self) -> str:
        return f"Run({self.name!r} on {self.storage.root}: {', '.join(self.crosscoders)})"

    def _repr_html_(self) -> str:
        """The verdict, as the terminal prints it."""
        import html

        return f"<pre>{html.escape(self.verdict())}</pre>"

    def verdict(self) -> str:
        """The verdict table as text."""
        return self.storage.read_bytes(f"{self.folder}/verdict.txt").decode()

    def report(self) -> str:
        """Path or URL of the page."""
        return self.storage.url(f"{self.folder}/report.html")

    def crosscoder(self, name: str, *, device: str | torch.device = "cpu") -> Crosscoder:
        """A crosscoder of the run, with its training curve."""
        folder = self._folder_of(_CROSSCODER, name)
        with open_crosscoder(self.storage, folder) as read:
            made = Crosscoder.of(read, self.origin)
        curve = read_curve(self.storage, folder)
        made.curve = None if curve is None else curve.to_pandas()
        return made.to(device)

    def latents(self, name: str) -> pd.DataFrame:
        """The latent table of a crosscoder; `attrs` as crossray.latents sets them."""
        table = self.table("latents", name)
        folder = self._folder_of("latents", name)
        settings = self._record(folder).identity["section"]
        table.attrs.update(
            TABLE_METADATA, fidelity=self.storage.read_json(f"{folder}/fidelity.json"), settings=settings
        )
        return table

    def causality(self, name: str) -> pd.DataFrame:
        """KL to the chat model after each intervention."""
        return self.table("causality", name)

    def examples(self, name: str) -> pd.DataFrame:
        """Texts around the places where latents fire."""
        return self.table("examples", name)

    def steering(self, name: str) -> pd.DataFrame:
        """What steering with each latent does."""
        return self.table("steering", name)

    def logit_lens(self, name: str) -> pd.DataFrame:
        """Tokens that latents promote and suppress; those of the first tokens are `table(..., file="first_tokens")`."""
        return self.table("logit_lens", name)

    def table(
        self,
        stage: str,
        name: str = "",
        *,
        file: str | None = None,
        columns: Sequence[str] | None = None,
        where: tuple[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Any table of the run, or a part of it, which alone is fetched.

        Args:
            stage: a step of the run.
            name: of the crosscoder, where the step has one for each.
            file: a table beside the stage's main one.
            columns: names of columns; all by default.
            where: a column and the value that rows must have.

        Raises InputError, naming what there is, for a stage, a table or a column that the run does not have.
        """
        folder = self._folder_of(stage, name)
        wanted = f"{file or stage}.parquet"
        found = [one for one in self.storage.files(folder) if one.endswith(".parquet")]
        if wanted not in found:
            raise InputError(
                f"{stage}: expected a table {wanted}, got {', '.join(found) or 'no tables'} in this artifact"
            )
        return self._read(f"{folder}/{wanted}", columns, where)

    def _read(self, key: str, columns: Sequence[str] | None, where: tuple[str, Any] | None) -> pd.DataFrame:
        """A table that is there."""
        try:
            frame: pd.DataFrame = read_part(self.storage, key, columns, where).to_pandas()
        except KeyError as error:
            raise InputError(
                f"{key}: expected columns of this table, got {error.args[0]!r}, which it lacks; "
                f"pipeline/schema.py names them"
            ) from error
        return frame

    def column_names(self, stage: str, name: str = "") -> list[str]:
        """Columns of a stage's table."""
        key = f"{self._folder_of(stage, name)}/{stage}.parquet"
        return table_columns(self.storage, key)

    def activation_store(self) -> ActivationStore:
        """The run's rows as they lie on the storage root, to be read in parts."""
        return ActivationStore(self.storage, self._folder_of("activations", ""))

    def dashboard(self, name: str, latent: int) -> Dashboard:
        """A page of one latent of a crosscoder, which a notebook shows: what the report has of it."""
        return Dashboard(self.latent_report(name, latent), latent)

    def latent_report(self, name: str, latent: int) -> CrosscoderReport:
        """What the report's card of one latent is made of; of the large tables, the rows of this latent alone.

        InputError for a latent that the crosscoder does not have.
        """
        row = self.table("latents", name, where=("latent", latent))
        if row.empty:
            require_latents([latent], len(self.table("latents", name, columns=["latent"])), "latent")
        own = ("latent", latent)
        examples, logit_lens, autointerp = (
            self._optional(stage, name, where=own) for stage in ("examples", "logit_lens", "autointerp")
        )
        histograms, neighbours = (
            self._optional("examples", name, where=own, file=file) for file in ("histograms", "neighbours")
        )
        steering, planted = (self._optional(stage, name) for stage in ("steering", "planted"))
        samples = None if steering is None else self.table("steering", name, file="samples")
        return CrosscoderReport(
            name=name,
            kind="",
            latents=row,
            examples=examples,
            histograms=histograms,
            neighbours=neighbours,
            logit_lens=logit_lens,
            steering=steering,
            steering_samples=samples,
            planted=planted,
            autointerp=autointerp,
        )

    def has(self, stage: str, name: str = "") -> bool:
        """Whether the run has an artifact of this stage, for one crosscoder where it has one."""
        return f"{stage} {name}".rstrip() in self._inputs

    def artifacts(self) -> dict[str, str]:
        """Folder of each step's artifact below the storage root, by stage and crosscoder."""
        return {role: f"{role.partition(' ')[0]}/{own}" for role, own in self._inputs.items()}

    def settings(self) -> dict[str, Mapping[str, Any]]:
        """What was asked of each step, by stage and crosscoder: the sections that its fingerprint covers."""
        return {role: self._record(folder).identity["section"] for role, folder in self.artifacts().items()}

    def summary(self, *, num_latents: int = 10) -> Summary:
        """Verdict, strongest latents, examples, causality and steering as plain values; `.model_dump()` is a dict.

        num_latents: at most so many per crosscoder.
        """
        if num_latents < 0:
            raise InputError(f"expected a number of latents of at least 0, got {num_latents}")
        return Summary(
            name=self.name,
            created=self.created,
            root=self.storage.root,
            report=self.report(),
            base=self.labels[0],
            chat=self.labels[1],
            layer=self.origin.layer,
            is_distinguishable=self.is_distinguishable,
            crosscoders=tuple(self.crosscoder_summary(name, num_latents=num_latents) for name in self.crosscoders),
        )

    def crosscoder_summary(self, name: str, *, num_latents: int = 10) -> CrosscoderSummary:
        """The part of `summary()` that is about one crosscoder."""
        stages = ("examples", "causality", "steering")
        tables = {stage: self._optional(stage, name) for stage in stages}
        return crosscoder_summary(name, self.latents(name), **tables, num_latents=num_latents)

    @property
    def is_distinguishable(self) -> bool | None:
        """Whether the two models can be told apart at all; None where that was not measured."""
        if not self.has("evidence"):
            return None
        return bool(self._record(self._folder_of("evidence", "")).counts["is_distinguishable"])

    def rows(self, split: str = Split.VALIDATION) -> Rows:
        """The run's rows of one split, in memory; validation by default, which latents are judged on."""
        folder = self.storage.url(self._folder_of("activations", ""))
        return Rows.load(folder, split=split).of_origin(self.origin)

    @cached_property
    def origin(self) -> Origin:
        """The pair and the layer; a local model's name is not kept."""
        section = self._record(self._folder_of("activations", "")).identity["section"]
        base, chat = (_named(section["models"][name]) for name in ("base", "chat"))
        return Origin(base, chat, int(section["layer"]))

    def _optional(
        self, stage: str, name: str, where: tuple[str, Any] | None = None, file: str | None = None
    ) -> pd.DataFrame | None:
        """A table, or the rows of one value; None where its analysis was off, or is older than the table."""
        if not self.has(stage, name):
            return None
        if file is None:
            return self.table(stage, name, where=where)
        folder, wanted = self._folder_of(stage, name), f"{file}.parquet"
        return self._read(f"{folder}/{wanted}", None, where) if wanted in self.storage.files(folder) else None

    def _folder_of(self, stage: str, name: str) -> str:
        """The artifact of a step; InputError for a name that is not there."""
        role = f"{stage} {name}".rstrip()
        if role not in self._inputs:
            names = {key.partition(" ")[2] for key in self._inputs} - {""}
            if name and name not in names:
                raise InputError(f"{self.name}: expected one of {', '.join(sorted(names))}, got {name!r}")
            have = ", ".join(sorted({key.partition(" ")[0] for key in self._inputs}))
            raise InputError(
                f"{self.name}: expected a step of the run ({have}), got {role!r}, which was off or is unknown"
            )
        return f"{stage}/{self._inputs[role]}"

    def _record(self, folder: str) -> Record:
        key = f"{folder}/{RECORD_NAME}"
        if not self.storage.exists(key):
            raise ArtifactError(f"{self.storage.url(folder)}: expected a finished artifact, got none; run again")
        return parse_record(self.storage.read_json(key), self.storage.url(folder))


def _reports(storage: Storage) -> list[_Found]:
    keys = [f"{_REPORT}/{folder}/{RECORD_NAME}" for folder in storage.folders(_REPORT)]
    records = [parse_record(storage.read_json(key), storage.url(key)) for key in keys if storage.exists(key)]
    return [_Found(str(record.provenance.get("created", "")), record) for record in records]


def _named(identity: Mapping[str, Any]) -> ModelOrigin:
    """A model of the hub by its id; one that is known by its content, or with an adapter, has no name."""
    source = identity.get("source")
    return ModelOrigin(source if isinstance(source, str) and "adapter" not in identity else "")
