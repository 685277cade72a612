"""Finds a published crosscoder (a folder, a file or a hub id) and reads it without running anyone's code.

`read_published("runs/mine")` or `read_published("owner/name")` returns tensors and settings
(`layouts.PublishedCrosscoder`), of which `Crosscoder.from_pretrained` makes the module. Weights are safetensors or a
pickled state dict read with `weights_only=True`: a pickle that asks for anything but tensors is refused, and no switch
allows it. Files from the hub go into the hub's own cache; nothing is written elsewhere.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoints.layouts import OWN_SETTINGS, PublishedCrosscoder, read_layout
from pipeline.errors import InputError, first_line, short

WEIGHTS_NAMES = ("model.safetensors", "cc_weights.pt")
"""Preferred names of the weights; else the only safetensors file, else the only pickled state dict."""
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
TRAINER_NAME = "trainer_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")


class CheckpointFiles(NamedTuple):
    """The files of one checkpoint on this machine."""

    weights: Path
    settings: Path | None
    """config.json or cfg.json beside the weights."""
    trainer: Path | None
    """trainer_config.json beside the weights."""


def read_published(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    activation_scale: Sequence[float] | None = None,
) -> PublishedCrosscoder:
    """The crosscoder at `source`: a folder, a weights file, or a hub id `owner/name[/subfolder]`.

    `revision` (branch, tag or commit) is only for hub ids. `activation_scale` is only for the layout with `cfg.json`
    and `cc_weights.pt`, whose weights expect activations scaled to mean norm sqrt(D) without saying by how much: one
    number per model, sqrt(D) / mean |x^m| over the training rows. Without it such a file still loads, marked
    `is_scale_unknown`, and expects activations that are already scaled. Raises InputError for anything missing,
    damaged, unknown or unsafe.
    """
    files = find_files(source, revision=revision, subfolder=subfolder)
    tensors, header = _read_tensors(files.weights)
    return read_layout(
        tensors, _read_settings(files, header), where=str(files.weights), activation_scale=activation_scale
    )


def find_files(source: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> CheckpointFiles:
    """The files of a checkpoint on this machine; those of a hub id are downloaded into the hub's cache first."""
    path = Path(source)
    if not os.path.exists(path):  # noqa: PTH110 - pathlib's raises for a name that no file can have
        return _fetch(str(source), revision, subfolder)
    if revision is not None:
        raise InputError(
            f"revision is for hub ids, came {revision!r} for the local path {path}: leave it out, or rename the local "
            f"path if the hub id of the same name is meant"
        )
    path = path / subfolder if subfolder is not None else path
    if path.is_file():
        return _beside(path)
    if not path.is_dir():
        raise InputError(f"expected a folder at {path}, came nothing: check the subfolder {subfolder!r}")
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return _beside(path / choose_weights(names, str(path)))


def choose_weights(names: Iterable[str], where: str) -> str:
    """The weights file among the relative paths `names`: at the top if possible, else in the only folder with one.

    Raises InputError when there is none, or when several could be meant.
    """
    paths = [PurePosixPath(name) for name in names if not PurePosixPath(name).name.startswith(".")]
    weights = [path for path in paths if path.suffix in (".safetensors", *PICKLE_SUFFIXES)]
    folders = {path.parent for path in weights}
    top = PurePosixPath(".")
    folder = top if top in folders else next(iter(folders), top)
    inside = sorted(path for path in weights if path.parent == folder)
    preferred = [path for name in WEIGHTS_NAMES for path in inside if path.name == name]
    safe = [path for path in inside if path.suffix == ".safetensors"]
    candidates = preferred[:1] or safe or inside
    if not weights:
        raise InputError(
            f"expected {' or '.join(WEIGHTS_NAMES)}, or one other safetensors or .pt file, came "
            f"{sorted(map(str, paths))[:8]} in {where}: give the folder that holds a crosscoder's weights"
        )
    if len(candidates) > 1 or (folder != top and len(folders) > 1):
        raise InputError(
            f"expected one crosscoder, came {sorted(map(str, candidates if folder == top else weights))[:8]} in "
            f"{where}: name the file, or the folder of the one that is meant (subfolder=...)"
        )
    return str(candidates[0])


def _beside(weights: Path) -> CheckpointFiles:
    names = ("config.json", "cfg.json", f"{weights.stem}_cfg.json")
    settings = next((weights.with_name(name) for name in names if weights.with_name(name).is_file()), None)
    trainer = weights.with_name(TRAINER_NAME)
    return CheckpointFiles(weights, settings, trainer if trainer.is_file() else None)


def _fetch(source: str, revision: str | None, subfolder: str | None) -> CheckpointFiles:
    """The files of a hub id in the hub's cache; downloads the weights and the settings beside them, nothing else."""
    if not _HUB_ID.fullmatch(source):
        raise InputError(
            f"expected a folder, a weights file or a hub id (owner/name), came {source!r}: no such path exists here, "
            f"and it is no hub id"
        )
    import huggingface_hub  # needed only here: reading local files must work without it
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    owner, name, *rest = source.split("/")
    repo_id, folder = f"{owner}/{name}", "/".join([*rest, *([subfolder] if subfolder is not None else [])]).strip("/")
    try:
        try:
            listing = huggingface_hub.HfApi().list_repo_files(repo_id, revision=revision)
        except OfflineModeIsEnabled:
            root = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
            return _beside(root / folder / choose_weights(_files_under(root / folder), f"{repo_id} in the hub's cache"))
        inside = [str(PurePosixPath(path).relative_to(folder)) for path in listing if _is_under(path, folder)]
        weights = PurePosixPath(folder) / choose_weights(inside, f"{repo_id}/{folder}".rstrip("/"))
        settings = [path for path in listing if PurePosixPath(path).parent == weights.parent and path.endswith(".json")]
        for path in settings:
            huggingface_hub.hf_hub_download(repo_id, path, revision=revision)
        return _beside(Path(huggingface_hub.hf_hub_download(repo_id, str(weights), revision=revision)))
    except (OSError, HTTPError, HFValidationError) as error:
        raise InputError(
            f"expected a crosscoder at the hub id {repo_id} (revision {revision or 'main'}), came "
            f"{type(error).__name__}: {first_line(error)}; no local path {source!r} exists either: check the "
            f"name, the revision, the network, and access (HF_TOKEN) for private repositories"
        ) from error


def _is_under(path: str, folder: str) -> bool:
    return not folder or PurePosixPath(folder) in PurePosixPath(path).parents


def _files_under(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a weights file on the CPU, and crossray's own settings from its header ({} elsewhere)."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path), {}
    raise InputError(
        f"expected weights as .safetensors or {', '.join(PICKLE_SUFFIXES)}, came {path.name!r} at {path}: give the "
        f"weights file, or its folder"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {}).get(OWN_SETTINGS, "{}"))
            if not isinstance(header, dict):
                raise ValueError(f"its header names {short(header)} as crossray's settings")
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"expected a whole safetensors file, came {path.stat().st_size} bytes that cannot be read "
            f"({first_line(error)}) at {path}: download or copy it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A pickled state dict; with weights_only=True torch.load builds tensors and containers, and calls nothing."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        raise InputError(
            f"expected a pickled dict of tensors, came a pickle that asks for other objects, or a damaged one "
            f"({reason.strip() or first_line(error)}) at {path}: such files can run code, so they are never "
            f"loaded; ask for safetensors, or save its state_dict() alone"
        ) from error
    except Exception as error:  # a damaged pickle can ask its reader for anything
        raise InputError(
            f"expected a whole file written by torch.save, came {path.stat().st_size} bytes that cannot be read "
            f"({type(error).__name__}) at {path}: download or copy it again"
        ) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        keys = short(list(loaded)[:8]) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise InputError(
            f"expected a dict from names to tensors, came {keys} at {path}: save the crosscoder's state_dict() alone"
        )
    return {str(key): tensor for key, tensor in loaded.items()}


def _read_settings(files: CheckpointFiles, header: Mapping[str, Any]) -> dict[str, Any]:
    """The settings beside the weights, trainer's under "trainer", crossray's own under "crossray"."""
    settings = _read_json(files.settings) if files.settings is not None else {}
    if files.trainer is not None:
        trainer = _read_json(files.trainer)
        settings["trainer"] = trainer.get("trainer", trainer)
    return {**settings, OWN_SETTINGS: dict(header)} if header else settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"expected JSON settings, came a file that is none ({first_line(error)}) at {path}: correct it"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"expected a JSON object with settings, came {type(loaded).__name__} at {path}: correct it")
    return loaded
