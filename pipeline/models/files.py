"""Which files of a local model folder are loaded, by what they hold.

A folder also holds files that no loader opens: model cards, locks of a download, optimizer states, older checkpoints.
The order of the weights' names is that of `from_pretrained`. Also here: what a config or a tokenizer's settings say of
a model that is on this machine, before anything is loaded. Nothing here reads weights or imports torch.
"""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
GGUF_SUFFIX = ".gguf"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", GGUF_SUFFIX)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_CONFIG = ("config.json", "generation_config.json")
_TOKENIZER = (
    *("*token*.json", "tekken.json", "*.tokenizer", "*.tiktoken", "*.model", "*.spm", "*vocab*", "merges.txt"),
    *("*bpe*", "dict.txt", "normalizer.json", "emoji.json", "byte_maps.json", "chat_template*"),
)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


def existing_path(source: str) -> Path | None:
    """The file or folder that a source names; None where there is none, as for a hub id or an impossible name."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a NUL
        return None


def is_adapter_folder(source: str) -> bool:
    """Whether a source is a folder of this machine that holds an adapter."""
    path = existing_path(source)
    return path is not None and (path / "adapter_config.json").is_file()


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a source names: itself, or the only one in a folder that holds no other model.

    None where it names none; InputError for a folder with several.
    """
    path = existing_path(source)
    if path is None or path.is_file():
        return path if path is not None and path.suffix == GGUF_SUFFIX else None
    found = [] if (path / "config.json").exists() else sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise InputError(f"model {source!r}: expected a folder with one GGUF file, got {names}; name one of them")
    return found[0] if found else None


def loaded_files(folder: Path, *, with_code: bool = False) -> dict[str, list[Path]]:
    """Files that loading a model or an adapter from this folder reads, by kind; only kinds that it has.

    with_code: whether Python files that come with the model run.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    kinds = {
        "weights": [folder / name for name in _weights(folder, names)],
        "config": [folder / name for name in names if name in _CONFIG],
        "tokenizer": [folder / name for name in names if _is_tokenizer(name)] + _templates(folder),
        "adapter": [folder / name for name in names if name in _ADAPTER],
        "code": sorted(_code(folder)) if with_code else [],
    }
    return {kind: files for kind, files in kinds.items() if files}


def read_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a local folder, or of a hub id in the hub's cache; {} where it is not on this machine."""
    path = _here(source, "config.json", revision)
    return {} if path is None else _json(path)


def context_of(source: str, revision: str | None = None) -> int | None:
    """The longest document that a model reads, by its config.json; None where that does not say or is not here."""
    found = read_config(source, revision)
    text = found.get("text_config")
    settings = found | text if isinstance(text, dict) else found
    return next((settings[key] for key in _CONTEXT_KEYS if isinstance(settings.get(key), int)), None)


def has_chat_template(source: str) -> bool | None:
    """Whether the tokenizer in a local folder has a chat template; None for what is no folder with a tokenizer."""
    folder = existing_path(source)
    if folder is None or not (settings := folder / "tokenizer_config.json").is_file():
        return None
    names = ("chat_template.jinja", "chat_template.json")
    return bool(_json(settings).get("chat_template")) or any((folder / name).is_file() for name in names)


def _here(source: str, name: str, revision: str | None) -> Path | None:
    folder = existing_path(source)
    if folder is not None:
        return folder / name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _weights(folder: Path, names: list[str]) -> list[str]:
    """The weights that the loader takes; every file that looks like weights where it has a choice that we do not know.

    Of an index enter the files that it names.
    """
    explicit = _json(folder / "config.json").get("transformers_weights")
    candidates = [str(name) for name in (explicit, *_WEIGHTS) if _is_inside(folder, name)]
    if not candidates:
        return [name for name in names if name.endswith(_WEIGHT_SUFFIXES) and name not in _ADAPTER]
    if not candidates[0].endswith(".index.json"):
        return [candidates[0]]
    shards = _json(folder / candidates[0]).get("weight_map")
    return sorted({name for name in shards.values() if _is_inside(folder, name)} if isinstance(shards, dict) else ())


def _is_inside(folder: Path, name: object) -> bool:
    """Whether a name that a file gives means a file of the folder."""
    is_plain = isinstance(name, str) and "\0" not in name and not Path(name).is_absolute()
    return is_plain and ".." not in Path(str(name)).parts and (folder / str(name)).is_file()


def _is_tokenizer(name: str) -> bool:
    return not name.endswith(_WEIGHT_SUFFIXES) and any(fnmatch(name, pattern) for pattern in _TOKENIZER)


def _templates(folder: Path) -> list[Path]:
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


def _code(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, which is for the loader to say."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
