"""The runs on a storage root: which there are, and what goes when one is removed. Records alone are read.

An artifact belongs to the run that made it. Other runs may read it, so a removal leaves whatever the records of the
runs that stay lead to.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pipeline.errors import ArtifactError, InputError
from pipeline.planning.sizes import format_bytes
from pipeline.storage.artifacts import RECORD_NAME, Record, all_folders, parse_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.locks import locked

_REPORT = "report"


class KeptRun(NamedTuple):
    """The artifacts that carry one run's name."""

    name: str
    changed: datetime
    """When the newest of them was finished."""
    num_artifacts: int
    crosscoders: tuple[str, ...]
    """Of its newest report."""
    report: str | None
    """Path or URL of that report; None where the run is not finished."""


class Removal(NamedTuple):
    """What a removal takes away."""

    runs: tuple[str, ...]
    sizes: Mapping[str, int]
    """Bytes by folder."""
    num_kept: int
    """Artifacts of these runs that stay, because other runs read them."""

    @property
    def num_bytes(self) -> int:
        """What it frees."""
        return sum(self.sizes.values())

    @property
    def text(self) -> str:
        """Every folder with its size, and what is freed in all."""
        lines = [f"  {format_bytes(num_bytes):>9}  {folder}" for folder, num_bytes in self.sizes.items()]
        stay = f"; {self.num_kept} artifacts stay, since other runs read them" if self.num_kept else ""
        return "\n".join(
            [*lines, f"frees    {format_bytes(self.num_bytes)} of {', '.join(self.runs) or 'no run'}{stay}"]
        )


def kept_runs(storage: Storage) -> list[KeptRun]:
    """All runs with at least one artifact, the one that changed last first.

    Raises InputError where there is no such root.
    """
    return _runs_of(_records(storage), storage)


def _runs_of(records: Mapping[str, Record], storage: Storage) -> list[KeptRun]:
    by_name: dict[str, list[tuple[str, Record]]] = {}
    for folder, record in records.items():
        by_name.setdefault(record.run_name, []).append((folder, record))
    runs = [_run(storage, name, own) for name, own in by_name.items()]
    return sorted(runs, key=lambda run: (-run.changed.timestamp(), run.name))


def runs_text(runs: Sequence[KeptRun]) -> str:
    """One line per run."""
    width = max((len(run.name) for run in runs), default=0)
    lines = [
        f"{run.name:<{width}}  {run.changed:%Y-%m-%d %H:%M}Z  {run.num_artifacts:>4} artifacts  "
        + (", ".join(run.crosscoders) if run.report else "unfinished")
        for run in runs
    ]
    return "\n".join(lines) or "no runs there"


def removal(
    storage: Storage, names: Sequence[str], *, older_than_days: float | None = None, now: datetime | None = None
) -> Removal:
    """What goes with the runs of these names and with those that nothing was added to for so long; nothing is touched.

    Raises InputError for a name that is not there, and where neither names nor an age are given.
    """
    if not names and older_than_days is None:
        raise InputError("rm: expected names of runs or --older-than DAYS, got neither; `crossray runs` lists the runs")
    records = _records(storage)
    runs = {run.name: run for run in _runs_of(records, storage)}
    unknown = [name for name in names if name not in runs]
    if unknown:
        raise InputError(
            f"{storage.root}: expected names of runs ({', '.join(sorted(runs)) or 'there is none'}), got {unknown[0]!r}"
        )
    going = set(names)
    if older_than_days is not None:
        before = (now or datetime.now(UTC)) - timedelta(days=older_than_days)
        going |= {run.name for run in runs.values() if run.changed < before}
    stay = _reached(records, [folder for folder, record in records.items() if record.run_name not in going])
    own = [folder for folder, record in records.items() if record.run_name in going]
    folders = [folder for folder in own if folder not in stay]
    sizes = {
        folder: sum(storage.size(f"{folder}/{name}") for name in storage.files(folder)) for folder in sorted(folders)
    }
    return Removal(tuple(sorted(going)), sizes, len(own) - len(folders))


def remove(storage: Storage, planned: Removal) -> None:
    """Removes these artifacts, records first; CrossrayError where a run is making one of them now."""
    with locked(storage, list(planned.sizes), "rm"):
        for folder in planned.sizes:
            storage.delete(f"{folder}/{RECORD_NAME}")  # whatever happens next, no half of it counts as finished
            storage.delete(folder)


def _records(storage: Storage) -> dict[str, Record]:
    """The readable records by folder; those of another schema version belong to another release."""
    found = {}
    for folder in all_folders(storage):
        key = f"{folder}/{RECORD_NAME}"
        if storage.exists(key):
            try:
                found[folder] = parse_record(storage.read_json(key), storage.url(folder))
            except ArtifactError:
                continue
    return found


def _run(storage: Storage, name: str, own: Collection[tuple[str, Record]]) -> KeptRun:
    reports = [(_time(record), folder, record) for folder, record in own if record.stage == _REPORT]
    changed = max(_time(record) for _, record in own)
    if not reports:
        return KeptRun(name, changed, len(own), (), None)
    _, folder, newest = max(reports, key=lambda report: report[:2])
    crosscoders = tuple(newest.identity["section"]["crosscoders"])
    return KeptRun(name, changed, len(own), crosscoders, storage.url(f"{folder}/report.html"))


def _time(record: Record) -> datetime:
    return datetime.fromisoformat(str(record.provenance.get("created", "1970-01-01T00:00:00+00:00")))


def _reached(records: Mapping[str, Record], starts: Iterable[str]) -> set[str]:
    """These folders and all that they were made from."""
    by_fingerprint = {record.fingerprint: folder for folder, record in records.items()}
    reached, queue = set[str](), list(starts)
    while queue:
        folder = queue.pop()
        if folder not in reached:
            reached.add(folder)
            inputs = records[folder].identity.get("inputs", {}).values()
            queue += [by_fingerprint[own] for own in inputs if own in by_fingerprint]
    return reached
