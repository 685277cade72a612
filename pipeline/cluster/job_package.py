"""What a job carries: this package's code, and of the local files that a run file names those that a run can read.

Everything is packed by a list of what is needed, so that nothing else travels: no `.env`, no `.git`, no folder of
finished runs. A link that leads out of the folder in which it lies is refused.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError, first_line, is_secret_name, redacted

_PACKAGE = "pipeline"
_CODE_SUFFIXES = frozenset({".py", ".html", ".js", ".css"})
_MODEL_SUFFIXES = frozenset(
    {".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".vocab", ".py", ".pt", ".pth", ".bin"}
)
"""Of the files in a named folder, which is that of a model, an adapter or a crosscoder."""
_MOST_FOLDERS = 1
"""Between a named folder and a file of it that travels; published crosscoders may lie one below."""
_FILE_KEYS = frozenset({"paths", "prompts_path", "chat_template", "source", "adapter"})
"""Keys of a run file whose values may name a file or folder of this machine."""
_MAX_FILE_BYTES = 100_000_000
"""Of all local files together; more belongs on the object store, once, not into every job."""


class Packed(NamedTuple):
    """One thing that travels with a job."""

    source: str
    """Where it is on this machine."""
    num_files: int
    num_bytes: int


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise an InputError for a variable that holds a secret, by its name or its value: the dashboard shows them."""
    for name, value in sorted(environment.items()):
        if is_secret_name(name) or redacted(value) != value:
            raise InputError(
                f"--env: expected plain settings, got {name}, which looks like a secret: a job's environment is "
                "readable in the dashboard; set it in the environment of the cluster's nodes"
            )


def pack_code(folder: Path, package: str = _PACKAGE) -> Packed:
    """Copy this package's code, or that of another one, into a job's folder."""
    spec = find_spec(package)
    assert spec is not None, package
    source = Path(next(iter(spec.submodule_search_locations or ())))
    files = [file for file in _files(source, "the package") if file.suffix in _CODE_SUFFIXES]
    return _copy(source, files, folder / package)


class NamedFiles:
    """Copies the local files that a run file names and gives their names inside the job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._moved: dict[str, str] = {}
        self.packed: list[Packed] = []

    def moved(self, value: Any, key: str = "") -> Any:
        """The same settings with the job's paths in place of this machine's."""
        if isinstance(value, dict):
            return {name: self.moved(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.moved(item, key) for item in value]
        is_local = key in _FILE_KEYS and isinstance(value, str) and Path(value).expanduser().exists()
        return self._copied(Path(value).expanduser(), key) if is_local else value

    def _copied(self, path: Path, key: str) -> str:
        source = str(path)
        if source in self._moved:
            return self._moved[source]
        files = [path] if path.is_file() else [own for own in _files(path, key) if _is_needed(own, path)]
        inside = f"{len(self._moved):03d}-{path.name}"
        total = sum(own.num_bytes for own in self.packed) + sum(file.stat().st_size for file in files)
        if total > _MAX_FILE_BYTES:
            raise InputError(
                f"{key}: expected local files of at most {_MAX_FILE_BYTES // 10**6} MB in a job, got "
                f"{total // 10**6} MB up to {source!r}; put it on the object store and name its URL"
            )
        self.packed.append(_copy(path, files, self._folder / inside))
        self._moved[source] = f"./files/{inside}"
        return self._moved[source]


def _is_needed(file: Path, folder: Path) -> bool:
    return file.suffix in _MODEL_SUFFIXES and len(file.relative_to(folder).parts) <= _MOST_FOLDERS + 1


def _files(folder: Path, key: str) -> Iterator[Path]:
    """The files below a folder without hidden ones; an InputError for a link that leads nowhere or out of it.

    The folder of a model in the hub's cache holds links to its neighbour `blobs`.
    """
    within = folder.resolve()
    within = within.parent.parent if within.parent.name == "snapshots" else within
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted([*names, *(name for name in folders if Path(here, name).is_symlink())]):
            path = Path(here, name)
            if name.startswith("."):
                continue
            if path.is_symlink():
                _check_link(path, within, key)
            if path.is_file():
                yield path


def _check_link(path: Path, within: Path, key: str) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{key}: expected files, got a link that leads nowhere, {path}: {first_line(error)}"
        ) from error
    if not target.is_relative_to(within):
        raise InputError(
            f"{key}: expected files of {within}, got a link out of it, {path} -> {target}; put the file itself there, "
            "or the folder on the object store"
        )


def _copy(source: Path, files: list[Path], target: Path) -> Packed:
    num_bytes = 0
    for file in files:
        copy = target if file == source else target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        num_bytes += copy.stat().st_size
    return Packed(str(source), len(files), num_bytes)
