"""What a stage works on: the missing steps of a run, and the surroundings in which they are made.

A step is one artifact that a run needs: its identity, known before anything is made, and the typed inputs from which a
stage makes it (stages/catalogue.py). Each stage file has a function `run(steps, context)` that publishes its steps, or
raises where one cannot be made. Nothing heavy is imported here: a finished run is recognised within a second.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from pipeline.config.resources import ResourcesSection
from pipeline.config.section import Section
from pipeline.errors import ArtifactError
from pipeline.storage.artifacts import ArtifactKey, Record, read_record, write_record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Progress, Reporter
from pipeline.tracking.tracker import Point


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """What a stage needs to make one artifact: its section of the run file, finished artifacts, plain values."""

    NAME: ClassVar[str]
    """Of the stage, and of the folder that holds its artifacts."""
    VERSION: ClassVar[int]
    """Raise it when a change of code changes the bytes that are written."""
    READS: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold the steps whose artifacts are read, or None."""
    section: Section

    def reads(self) -> "dict[str, Step[StageInputs]]":
        """The steps whose artifacts are read, by role."""
        steps = {role: getattr(self, role) for role in self.READS}
        return {role: step for role, step in steps.items() if step is not None}


Inputs = TypeVar("Inputs", bound=StageInputs, covariant=True)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Step(Generic[Inputs]):
    """One artifact that a run needs."""

    key: ArtifactKey
    """Its identity."""
    inputs: Inputs
    crosscoder_name: str = ""
    """The crosscoder that it belongs to; empty for what all crosscoders share."""

    @property
    def name(self) -> str:
        """What the user reads: `crosscoder batch_topk`."""
        return f"{self.key.stage} {self.crosscoder_name}".rstrip()

    @property
    def folder(self) -> str:
        """The artifact's folder below the storage root."""
        return self.key.folder


class CurveListener(Protocol):
    """Receives the curves of a step while it is still being made."""

    def points(self, step: Step[StageInputs], points: Sequence[Point]) -> None:
        """Values of curves, in order, each once."""
        ...


class StageContext(NamedTuple):
    """Where and how a stage works; nothing here changes what it makes."""

    storage: Storage
    resources: ResourcesSection
    reporter: Reporter
    curves: CurveListener
    run_name: str
    log_every_steps: int

    def record_of(self, step: Step[StageInputs]) -> Record:
        """The record of an input; ArtifactError where it is not finished."""
        record = read_record(self.storage, step.key)
        if record is None:
            raise ArtifactError(
                f"{self.storage.url(step.folder)}: expected the finished artifact of {step.name}, got none; run again"
            )
        return record

    def report_progress(self, progress: Progress, done: int, note: str = "") -> None:
        """Tell the user how far a stage is."""
        self.reporter.progress(progress.update(done, note))

    def follow(self, progress: Progress, results: Iterable[Result], size: Callable[[Result], int]) -> Iterator[Result]:
        """The results as they come; each moves the progress on by its size."""
        self.report_progress(progress, 0)
        for result in results:
            self.report_progress(progress, progress.done + size(result))
            yield result

    def finish(
        self, step: Step[StageInputs], counts: Mapping[str, Any], seconds: float, files: Sequence[str] | None = None
    ) -> Record:
        """Publish a step's record, which makes it complete; `files` as in `write_record`."""
        return write_record(
            self.storage,
            step.key,
            name=step.name,
            counts=counts,
            seconds=seconds,
            run_name=self.run_name,
            files=files,
        )
