"""A run file for two models, written for the user: `crossray init BASE CHAT`.

Layer, family and rows follow from the models' shapes and from the free disk; every choice stands in the file with its
reason. Shapes come from the config.json of local folders and from a table of known models, so nothing is downloaded.
The file is loaded once before it is written.
"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from pipeline.config.data import TokensSection
from pipeline.config.json_schema import FILE_NAME, header, schema_text
from pipeline.config.run_file import RunConfig, load
from pipeline.errors import InputError, first_line
from pipeline.models.files import context_of, existing_path, is_adapter_folder
from pipeline.models.known import KNOWN
from pipeline.models.loading import ModelSpec, check_pair
from pipeline.storage.filesystem import Storage


class Shape(NamedTuple):
    """What a draft needs to know of a model."""

    num_layers: int
    width: int
    preset: str | None
    """Family in config/presets.py; None where it has none."""
    context: int | None = None
    """The longest document that it reads; None where that is not known here."""


_PRESET_OF_TYPE = {
    "gemma2": "gemma-2",
    "gemma3_text": "gemma-3",
    "gemma3": "gemma-3",
    "qwen2": "qwen-2.5",
    "qwen3": "qwen-3",
}
_LLAMA_3_VOCABULARY = 128_256
_PAPER_TOKENS = 102_000_000
_CPU_TOKENS = 2_000_000
_PAPER_K = 100
_DISK_SHARE = 0.5
"""Of the free disk for the activations; codes, tables and other runs need room too."""
_LOSSLESS = 2 / 3
"""Bytes on disk of bytes in memory."""
_KINDS = {".jsonl": "jsonl", ".gz": "jsonl", ".parquet": "parquet", ".txt": "text"}


class Machine(NamedTuple):
    """Where the run will be."""

    num_gpus: int
    free_bytes: int | None


class Corpora(NamedTuple):
    """Files of the user's; None takes public data sets of the hub."""

    texts: str | None = None
    """JSON lines or Parquet with a column `text`, or plain text."""
    dialogues: str | None = None
    """JSON lines or Parquet with a column `messages`."""


def draft(base: str, chat: str, corpora: Corpora, machine: Machine, *, name: str | None = None) -> str:
    """The text of the run file.

    chat may be the folder of a LoRA adapter of base. InputError for a model whose shape is not known here, for two
    widths, and for a file of an unknown kind.
    """
    is_adapter = is_adapter_folder(chat)
    shapes = [shape_of(base, "BASE"), shape_of(base if is_adapter else chat, "CHAT")]
    if shapes[0].width != shapes[1].width:
        raise InputError(
            f"init: expected two models of one width, got {shapes[0].width} for {base!r} and {shapes[1].width} for "
            f"{chat!r}; choose a base model and its fine-tuned version"
        )
    shape = shapes[1]._replace(context=min((own.context for own in shapes if own.context), default=None))
    text = _text(base, chat, shape, corpora, machine, is_adapter=is_adapter, name=name or _name_of(chat))
    with tempfile.TemporaryDirectory(prefix="crossray-init-") as folder:
        path = Path(folder) / "draft.yaml"
        path.write_text(text, encoding="utf-8")
        load(path)
    return text


def shape_of(source: str, argument: str) -> Shape:
    """The shape of a model from the table or from a local folder; nothing is downloaded."""
    if source in KNOWN:
        known = KNOWN[source]
        return Shape(known.num_layers, known.width, known.preset)
    folder = existing_path(source)
    if folder is None or not (path := folder / "config.json").is_file():
        raise InputError(
            f"init: {argument}: expected a local folder with config.json or one of {', '.join(KNOWN)}, got {source!r}; "
            "download it first, or copy a file of workloads/pairs/ and change it"
        )
    spec = ModelSpec(str(path.parent.resolve()))
    found = check_pair(spec, spec, layer=0)
    kind = str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
    is_llama_3 = kind == "llama" and found.vocab_size == _LLAMA_3_VOCABULARY
    preset = "llama-3.1" if is_llama_3 else _PRESET_OF_TYPE.get(kind)
    return Shape(found.num_layers[0], found.activation_dim, preset, context_of(str(folder)))


def machine_here(root: str) -> Machine:
    """The GPUs of this machine and the free disk where artifacts go."""
    import torch

    return Machine(torch.cuda.device_count(), Storage(root).free_bytes())


def draft_path(chat: str, *, name: str | None, output: str | None) -> Path:
    """Where the run file of a fine-tuned model goes: under the run's name, unless `output` names it."""
    return Path(output or f"{name or _name_of(chat)}.yaml")


def write_draft(text: str, path: Path) -> None:
    """Writes the file, and beside it the schema that its first line names; InputError where it is there already."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        path.with_name(FILE_NAME).write_text(schema_text(RunConfig), encoding="utf-8")
    except FileExistsError as error:
        raise InputError(f"--output: expected a new file, got {str(path)!r}, which exists; name another") from error
    except OSError as error:
        raise InputError(
            f"--output: expected a file that can be written, got {str(path)!r}: {first_line(error)}"
        ) from error


def _name_of(chat: str) -> str:
    kept = [letter if letter.isascii() and (letter.isalnum() or letter in "_.-") else "-" for letter in Path(chat).name]
    return "".join(kept) or "pair"


def _text(
    base: str, chat: str, shape: Shape, corpora: Corpora, machine: Machine, *, is_adapter: bool, name: str
) -> str:
    asked = _PAPER_TOKENS if machine.num_gpus else _CPU_TOKENS
    bytes_per_row = 2 * 2 * shape.width * _LOSSLESS
    fitting = asked if machine.free_bytes is None else int(machine.free_bytes * _DISK_SHARE / bytes_per_row)
    num_tokens = max(10_000, min(asked, fitting) // 1000 * 1000)
    why = "the paper's 100M rows" if num_tokens == _PAPER_TOKENS else "as many as half of the free disk takes"
    if num_tokens == _CPU_TOKENS:
        why = "a start without a GPU; the paper's runs take 102_000_000"
    is_short = shape.context is not None and shape.context < TokensSection().max_tokens_per_document
    longest = f", max_tokens_per_document: {shape.context}" if is_short else ""
    chat_model = _quoted(base) + f", adapter: {_quoted(chat)}" if is_adapter else _quoted(chat)
    preset = f"preset: {shape.preset}" if shape.preset else "preset: null"
    k = max(8, min(_PAPER_K, shape.width // 16))
    expansion, gpus = (32, 1) if machine.num_gpus else (8, 0)
    precision = ", precision: bfloat16" if machine.num_gpus else ""
    lines = [
        header(FILE_NAME),
        "# Written by `crossray init`. Every key is documented below its field in pipeline/config/.",
        "# Look at it with `crossray plan`, then give it to `crossray run`.",
        f"name: {_quoted(name)}",
        f"{preset}  # rows to drop and token replacements of this family: pipeline/config/presets.py",
        "models:",
        f"  base: {{source: {_quoted(base)}}}",
        f"  chat: {{source: {chat_model}}}",
        f"  dtype: {'bfloat16' if machine.num_gpus else 'float32'}",
        "corpus:",
        "  sources:",
        *_source("web", corpora.texts, "text_column", "text"),
        *_source("chat", corpora.dialogues, "messages_column", "messages"),
        "  validation_frac: 0.05  # held out for all analyses",
        f"tokens: {{num_tokens: {num_tokens:_}{longest}}}  # {why}",
        f"activations: {{layer: {shape.num_layers // 2}, compression: lossless}}  # the middle of {shape.num_layers};"
        " auto measures it first",
        f"training: {{batch_rows: 2048, num_rows: {2 * num_tokens:_}{precision}}}  # two epochs",
        "crosscoders:",
        f"  - {{name: batch_topk, expansion: {expansion}, seeds: 2, power: {{}}, "
        f"sparsity: {{kind: batch_topk, k: {k}}}}}",
        "    # seeds: how many of its latents another seed finds; power: how strong a concept must be to be found",
        "resources:",
        f"  extraction: {{workers: {max(1, machine.num_gpus)}, gpus: {gpus}}}",
        f"  training: {{gpus: {gpus}}}",
        f"  analyses: {{workers: {max(1, machine.num_gpus)}, gpus: {gpus}}}",
        "storage: {root: runs}  # a folder, or s3://bucket/prefix",
    ]
    return "\n".join(lines) + "\n"


def _source(name: str, path: str | None, field: str, column: str) -> list[str]:
    """One entry of corpus.sources."""
    if path is not None:
        kind = _KINDS.get(Path(path).suffix)
        if kind is None or (kind == "text" and field == "messages_column"):
            raise InputError(
                f"init: expected a file of JSON lines or Parquet{' or .txt' * (column == 'text')}, got {path!r}"
            )
        about = "" if kind == "text" else f", {field}: {column}"
        return [f"    - {{name: {name}, kind: {kind}, paths: [{_quoted(path)}]{about}}}"]
    if name == "web":
        hub = "dataset: HuggingFaceFW/fineweb, subset: sample-10BT, text_column: text, max_documents: 150_000"
        return [f"    - {{name: web, kind: hub, {hub}}}"]
    hub = "dataset: lmsys/lmsys-chat-1m, messages_column: conversation, max_documents: 250_000"
    filters = "filters: {min_messages: 2, alternating_roles: true, ends_with_assistant: true}"
    return [
        "    - name: chat  # gated: needs HF_TOKEN",
        *(f"      {part}" for part in ["kind: hub", *hub.split(", "), filters]),
    ]


def _quoted(text: str) -> str:
    """A YAML scalar for any text."""
    return json.dumps(text, ensure_ascii=False)
