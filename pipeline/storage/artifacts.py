"""Identity of what a stage makes, and the record that marks it complete.

An artifact is one folder `<stage>/<fingerprint>` on the storage root. Its fingerprint is the SHA-256 of what was asked
for: stage name, stage VERSION, the config section and the fingerprints of its inputs; never a path, a machine or a
worker count. `record.json` is written last and atomically: a folder with a record is complete, one without is partial.
"""

import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ArtifactError, InputError
from pipeline.schema import SCHEMA_VERSION
from pipeline.storage.filesystem import Storage

RECORD_NAME = "record.json"
FINGERPRINT_LENGTH = 16
"""Hex digits kept in folder names and lineage: 64 bits, enough for any number of artifacts on one root."""

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "ray", "mlflow", "numpy", "pyarrow")


class ArtifactKey(NamedTuple):
    """Where an artifact lives and what it is made of, known before anything is made."""

    stage: str
    """Name of the stage, and of the folder that holds all of its artifacts."""
    fingerprint: str
    """FINGERPRINT_LENGTH hex digits."""
    identity: dict[str, Any]
    """What was hashed: version, section, inputs."""

    @property
    def folder(self) -> str:
        """The artifact's folder below the storage root."""
        return f"{self.stage}/{self.fingerprint}"


@dataclass(frozen=True)
class Record:
    """The completion marker: all that is known about an artifact, without opening it."""

    stage: str
    name: str
    """What the user reads: stage and, where there are several, the crosscoder's name."""
    fingerprint: str
    identity: dict[str, Any]
    counts: dict[str, Any]
    """Measured numbers and small facts that a later stage or the report needs (rows, labels, metrics)."""
    checksums: dict[str, str]
    """SHA-256 of each file of the folder, by relative name."""
    seconds: float
    run_name: str
    provenance: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def fingerprint_of(value: Any) -> str:
    """SHA-256 (shortened) of a value's canonical JSON; TypeError or ValueError for what has no canonical form."""
    _refuse_ambiguous(value, "value")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:FINGERPRINT_LENGTH]


def _refuse_ambiguous(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected string keys in a fingerprint, got {key!r}")
            _refuse_ambiguous(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse_ambiguous(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number in a fingerprint, got {value!r}")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(f"{where}: a {type(value).__name__} has no canonical form for a fingerprint: {value!r}")


def artifact_key(stage: str, version: int, section: Mapping[str, Any], inputs: Mapping[str, str]) -> ArtifactKey:
    """The identity of what `stage` makes from this section and these input fingerprints."""
    identity = {
        "version": version,
        "schema_version": SCHEMA_VERSION,
        "section": dict(section),
        "inputs": dict(inputs),
    }
    return ArtifactKey(stage, fingerprint_of({"stage": stage, **identity}), identity)


def read_record(storage: Storage, key: ArtifactKey) -> Record | None:
    """The artifact's record, or None where it is not complete."""
    if not storage.exists(f"{key.folder}/{RECORD_NAME}"):
        return None
    record = parse_record(storage.read_json(f"{key.folder}/{RECORD_NAME}"), storage.url(key.folder))
    if (record.stage, record.fingerprint) != (key.stage, key.fingerprint):
        raise ArtifactError(
            f"{storage.url(key.folder)}: expected the record of {key.folder}, got one of "
            f"{record.stage}/{record.fingerprint}; remove the folder to make it again"
        )
    return record


def all_folders(storage: Storage) -> list[str]:
    """The folders of all artifacts on a storage root, finished or not; an InputError where there is no such root."""
    if not storage.exists(""):
        raise InputError(f"{storage.root}: expected a storage root with artifacts, found nothing; correct the path")
    found = []
    for stage in storage.folders(""):
        found += [
            f"{stage}/{name}"
            for name in storage.folders(stage)
            if len(name) == FINGERPRINT_LENGTH and all(letter in "0123456789abcdef" for letter in name)
        ]
    return found


def parse_record(value: Any, where: str) -> Record:
    """A Record from its JSON; an ArtifactError where it is of another version or not a record at all."""
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: expected an artifact of schema version {SCHEMA_VERSION}, got version {version}; "
            "remove the folder to make it again, or use the crossray release that wrote it"
        )
    try:
        return TypeAdapter(Record).validate_python(vars(Record(**value)))
    except (TypeError, ValidationError) as error:
        what = " ".join(str(error).split())
        raise ArtifactError(
            f"{where}/{RECORD_NAME}: not a complete record ({what[:200]}); remove the folder to make it again"
        ) from error


def write_record(
    storage: Storage,
    key: ArtifactKey,
    *,
    name: str,
    counts: Mapping[str, Any],
    seconds: float,
    run_name: str,
    files: Sequence[str] | None = None,
) -> Record:
    """Checksum the artifact's files and publish its record; after this the artifact is complete.

    `files` limits the checksums to these names, for artifacts whose large files carry checksums in a manifest.
    """
    names = [file for file in storage.files(key.folder) if file != RECORD_NAME] if files is None else files
    checksums = {file: storage.digest(f"{key.folder}/{file}")[1] for file in names}
    record = Record(
        stage=key.stage,
        name=name,
        fingerprint=key.fingerprint,
        identity=key.identity,
        counts=dict(counts),
        checksums=checksums,
        seconds=round(seconds, 3),
        run_name=run_name,
        provenance=provenance(),
    )
    storage.write_json(f"{key.folder}/{RECORD_NAME}", record.__dict__)
    return record


@cache
def _static_provenance() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent.parent
    described = ""
    if (root / ".git").exists():
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    versions = {name: metadata.version(name) for name in _PACKAGES if _is_installed(name)}
    return {
        "code_version": described or f"crossray {_own_version()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def _own_version() -> str:
    return metadata.version("crossray") if _is_installed("crossray") else "unknown"


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def provenance() -> dict[str, Any]:
    """Code version (git commit where there is one), package versions and the time, for a record."""
    return {**_static_provenance(), "created": datetime.now(UTC).isoformat(timespec="seconds")}


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two identities differ, each with both values: `section.layer: 2 -> 3`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted(set(old) | set(new)):
            lines += differing_fields(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return lines
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for line in differing_fields(a, b, f"{prefix}[{i}]")
        ]
    if old != new and all(isinstance(one, str) and one.startswith("sha256:") for one in (old, new)):
        return [f"{prefix}: other content"]
    return [] if old == new else [f"{prefix}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def nearest_drift(storage: Storage, key: ArtifactKey, *, name: str, run_name: str) -> list[str]:
    """How `key` differs from the most similar complete artifact of the same step: the reason why it is stale.

    Only artifacts of the same step and run name count: another run's artifact is not a former state of this one.
    """
    best: list[str] = []
    for folder in storage.folders(key.stage):
        record_key = f"{key.stage}/{folder}/{RECORD_NAME}"
        if folder == key.fingerprint or not storage.exists(record_key):
            continue
        value = storage.read_json(record_key)
        if not isinstance(value, dict) or (value.get("name"), value.get("run_name")) != (name, run_name):
            continue
        drift = differing_fields(value.get("identity"), key.identity)
        if drift and (not best or len(drift) < len(best)):
            best = drift
    return best
