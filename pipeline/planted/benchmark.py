"""Runs the benchmark: worlds, then every recipe on every world, then the table; what exists is not made again.

Each world and each trial is an artifact with a record, as a run's steps are, so a killed benchmark continues and a
recipe that is added costs only its own trials. Worlds and trials are independent and go through a pool of Ray workers,
here or on a cluster.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipeline.checkpoints.published import find_files
from pipeline.cluster.connect import connected, listening
from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.run_file import validated
from pipeline.errors import InputError
from pipeline.planted.score import RULES, SCORE_COLUMNS, score_row, score_text, trial_score
from pipeline.planted.settings import BenchmarkConfig, CheckpointSection
from pipeline.planted.trial import MATCHES_NAME, Plant, Trial, read_truth
from pipeline.storage.artifacts import ArtifactKey, artifact_key, read_record, write_record
from pipeline.storage.content import content_digests
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, read_table, write_frame
from pipeline.terminal import Progress, Reporter

WORLD_STAGE, TRIAL_STAGE = "planted_activations", "planted_trial"
WORLD_VERSION, TRIAL_VERSION = 1, 3
RESULTS = "planted_results"
SCORES_NAME, SCORES_JSON, SCORES_TEXT = "scores.parquet", "scores.json", "scores.txt"
_DATA = "planted activations"


class Job(NamedTuple):
    """One world or one trial."""

    name: str
    key: ArtifactKey
    item: dict[str, Any]


class Results(NamedTuple):
    """What a benchmark made."""

    table: pd.DataFrame
    """SCORE_COLUMNS."""
    text: str
    folder: str
    """Path or URL of the table's files."""
    activations: dict[int, str]
    """Path or URL of each seed's activations."""
    num_made: int
    """Worlds and trials that this call made."""
    seconds: float


def run(config: BenchmarkConfig, reporter: Reporter) -> Results:
    """Makes what is missing and then the table; raises InputError before anything is written."""
    started = time.monotonic()
    storage = Storage(config.storage.root)
    worlds, trials = jobs_of(config)
    missing = [
        [job for job in jobs if read_record(storage, job.key) is None] for jobs in (list(worlds.values()), trials)
    ]
    if any(missing):
        storage.check_writable()
        with connected(config.cluster, _log_path(storage)):
            _plant(config, storage, missing[0], reporter)
            _try(config, storage, missing[1], reporter)
    table = scored(config, storage, worlds, trials)
    folder = f"{RESULTS}/{config.name}"
    write_frame(storage, f"{folder}/{SCORES_NAME}", table, arrow_schema(SCORE_COLUMNS))
    storage.write_json(f"{folder}/{SCORES_JSON}", {"scores": table.to_dict("records"), "config": _identity(config)})
    text = score_text(table)
    storage.write_bytes(f"{folder}/{SCORES_TEXT}", f"{text}\n".encode())
    places = {seed: storage.url(job.key.folder) for seed, job in worlds.items()}
    seconds = time.monotonic() - started
    return Results(table, text, storage.url(folder), places, sum(map(len, missing)), seconds)


def _identity(config: BenchmarkConfig) -> dict[str, Any]:
    """The benchmark without where and by how many processes it was made."""
    return config.model_dump(mode="json", exclude={"cluster", "workers", "storage"})


def _log_path(storage: Storage) -> Path:
    return Path(storage.url("logs/planted.log")) if storage.is_local else Path("crossray-logs/planted.log")


def jobs_of(config: BenchmarkConfig) -> tuple[dict[int, Job], list[Job]]:
    """The worlds by seed, and all trials, recipes first."""
    world = {"world": config.world.model_dump(mode="json"), "rows": config.rows.model_dump(mode="json")}
    worlds = {}
    for seed in config.seeds:
        key = artifact_key(WORLD_STAGE, WORLD_VERSION, world | {"seed": seed}, {})
        worlds[seed] = Job(f"world {seed}", key, {"seed": seed, "folder": key.folder})
    judge, training = config.judge.model_dump(mode="json"), config.training.model_dump(mode="json")
    trials = []
    for recipe in config.recipes:
        identity = {**recipe.identity(), "seeds": recipe.seeds}
        for seed in config.seeds:
            section = {"recipe": identity, "training": training, "judge": judge, "seed": seed}
            trials.append(_trial(f"{recipe.name}", worlds[seed], section, {"recipe": recipe, "seed": seed}))
    for checkpoint in config.checkpoints:
        section = {"checkpoint": _checkpoint_identity(checkpoint), "judge": judge}
        trials.append(_trial(checkpoint.name, worlds[checkpoint.seed], section, {"source": checkpoint.source}))
    return worlds, trials


def _trial(name: str, world: Job, section: dict[str, Any], item: dict[str, Any]) -> Job:
    key = artifact_key(TRIAL_STAGE, TRIAL_VERSION, section, {"activations": world.key.fingerprint})
    places = {"folder": key.folder, "activations": world.key.folder}
    return Job(name, key, item | places)


def _checkpoint_identity(checkpoint: CheckpointSection) -> str:
    path = Path(checkpoint.source)
    if not path.exists():
        return checkpoint.source
    files = [file for file in find_files(path) if file is not None]
    return f"sha256:{content_digests().of_group(files, path if path.is_dir() else path.parent)}"


def _plant(config: BenchmarkConfig, storage: Storage, jobs: Sequence[Job], reporter: Reporter) -> None:
    if not jobs:
        return
    by_folder = {job.key.folder: job for job in jobs}
    progress = Progress("worlds", len(jobs), "worlds")
    reporter.progress(progress.update(0))
    pool = Pool("workers", config.workers, Plant, (storage, config.world, config.rows))
    for done, result in enumerate(run_pool(pool, [job.item for job in jobs]), 1):
        record_job(config, storage, by_folder[result["folder"]], result)
        reporter.progress(progress.update(done))


def _try(config: BenchmarkConfig, storage: Storage, jobs: Sequence[Job], reporter: Reporter) -> None:
    if not jobs:
        return
    by_folder = {job.key.folder: job for job in jobs}
    num_fits = sum("recipe" in job.item for job in jobs)
    total = num_fits * config.training.num_steps
    progress, done = Progress("trials", max(total, 1), "steps"), 0

    def on_event(event: tuple[int, str]) -> None:
        nonlocal done
        done += event[0]
        reporter.progress(progress.update(min(done, total), event[1]))

    reporter.progress(progress.update(0, f"{len(jobs)} trials"))
    with listening(on_event) as board:
        pool = Pool("workers", config.workers, Trial, (storage, config.training, config.judge, board))
        for result in run_pool(pool, [job.item for job in jobs]):
            job = by_folder[result["folder"]]
            record_job(config, storage, job, result)
            reporter.message(f"{job.name} on {job.item['activations']}: {result['seconds']:.0f} s")


def record_job(config: BenchmarkConfig, storage: Storage, job: Job, result: Mapping[str, Any]) -> None:
    """Publishes the record of a world or a trial, which completes it, from what its worker returned."""
    counts = {name: value for name, value in result.items() if name != "folder"}
    write_record(
        storage, job.key, name=job.name, counts=counts, seconds=counts.get("seconds", 0.0), run_name=config.name
    )


def scored(config: BenchmarkConfig, storage: Storage, worlds: dict[int, Job], trials: Sequence[Job]) -> pd.DataFrame:
    """SCORE_COLUMNS over all finished trials, in the order of the recipes, every rule of each."""
    truths = {job.key.folder: read_truth(storage, job.key.folder)[1] for job in worlds.values()}
    rows = []
    for name in dict.fromkeys(job.name for job in trials):
        own = [job for job in trials if job.name == name]
        matches = [read_table(storage, f"{job.key.folder}/{MATCHES_NAME}").to_pandas() for job in own]
        records = [read_record(storage, job.key) for job in own]
        if None in records:
            raise InputError(f"{name}: expected finished trials, got {records.count(None)} without a record: run again")
        fidelities = [record.counts["fidelity"] for record in records if record is not None]
        has_seeds = any(getattr(job.item.get("recipe"), "seeds", 1) > 1 for job in own)
        for rule in RULES:
            if rule == "by_replication" and not has_seeds:
                continue
            scores = [
                trial_score(table, rule, truths[job.item["activations"]], min_cosine=config.min_cosine)
                for table, job in zip(matches, own, strict=True)
            ]
            rows.append(score_row(scores, fidelities, data=_DATA, recipe=name, rule=rule))
    return pd.DataFrame(rows, columns=[column.name for column in SCORE_COLUMNS])


def with_checkpoints(config: BenchmarkConfig, texts: Sequence[str]) -> BenchmarkConfig:
    """The benchmark with `NAME=SOURCE` or `NAME@SEED=SOURCE` as further checkpoints; without a seed the first one's."""
    added = []
    for text in texts:
        name, equals, source = text.partition("=")
        name, at, seed = name.partition("@")
        if not equals or not name or not source or (at and not seed.isdigit()):
            raise InputError(f"--checkpoint: expected NAME=SOURCE or NAME@SEED=SOURCE, got {text!r}")
        added.append({"name": name, "source": source, "seed": int(seed) if at else config.seeds[0]})
    tree = config.model_dump()
    return validated(BenchmarkConfig, tree | {"checkpoints": [*tree["checkpoints"], *added]}, "--checkpoint")
