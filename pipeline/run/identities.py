"""What enters fingerprints for files and models: the content of local ones, the revision of those elsewhere.

A step's identity is its section of the run file (run/flow.py). Where a section names a path or a model, the functions
here put what was found in place of the name, so that a changed file makes its steps stale and a moved one does not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from pipeline.config.analyses import SteeringSection
from pipeline.config.crosscoder import AdoptedCrosscoderSection, CrosscoderSection
from pipeline.config.data import CorpusSection, HubModel, OrganismModel
from pipeline.errors import InputError, short
from pipeline.models.files import GGUF_SUFFIX, existing_path, gguf_file, loaded_files
from pipeline.storage.content import DIGEST_LENGTH, content_digests
from pipeline.text.files import as_input_error, expand_paths, read_json
from pipeline.text.prompts import parse_prompts

Identity = dict[str, Any]
"""JSON that is hashed into a fingerprint; no stage reads it."""


def file_identity(path: str, where: str) -> str:
    """The content of a local file, or URL and version of one elsewhere."""
    expand_paths([path], where)
    with as_input_error(f"{where}: {path}"):
        fs, inner = fsspec.core.url_to_fs(path)
        if "file" in fs.protocol:
            return f"sha256:{content_digests().of_file(Path(inner))}"
        return f"{path}#{fs.ukey(inner)}"


def corpus_identity(section: CorpusSection) -> Identity:
    """The corpus section with the content of files in place of their paths, and without the tokens' weights."""
    identity = section.model_dump(mode="json")
    for source in identity["sources"]:
        if "paths" in source:
            where = f"corpus {source['name']!r}: paths"
            paths = expand_paths(source["paths"], where)
            _remember_contents(paths, where)
            source["paths"] = [file_identity(path, where) for path in paths]
        del source["weight"]
    return identity


def _remember_contents(paths: Sequence[str], where: str) -> None:
    """Read all local files at once, so that how far the reading is can be told of all of them."""
    with as_input_error(where):
        found = [fsspec.core.url_to_fs(path) for path in paths]
        content_digests().of_files([Path(inner) for fs, inner in found if "file" in fs.protocol])


def model_identity(model: HubModel | OrganismModel, where: str) -> Identity:
    """Content of a local model, id and revision of the hub's, replaced token ids, weight noise.

    The organism's models are identified by the organism artifact among the step's inputs. Raises InputError where a
    source that looks like a path is missing.
    """
    names = ("weight_noise", "weight_noise_seed")
    identity: Identity = {name: getattr(model, name) for name in names} if model.weight_noise else {}
    if isinstance(model, OrganismModel):
        return {"organism": model.member, **identity}
    sources = (("source", model.source, model.revision), ("adapter", model.adapter, model.adapter_revision))
    for field, source, revision in sources:
        if source is None:
            continue
        path = existing_path(source)
        if path is not None:
            identity[field] = _folder_identity(path, model, field, f"{where}.{field}")
        elif source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.endswith(GGUF_SUFFIX):
            raise InputError(
                f"{where}.{field}: expected a hub id or an existing folder, got {short(source)}; correct the path"
            )
        else:
            identity[field] = source
            identity[f"{field}_revision"] = revision
    if model.token_replacements:
        identity["token_replacements"] = sorted(model.token_replacements.items())
    return identity


def _folder_identity(folder: Path, model: HubModel, field: str, where: str) -> Identity:
    """The content of what is loaded from a folder, by kind: weights, config, tokenizer, adapter, code."""
    packed = gguf_file(str(folder)) if field == "source" else None
    if packed is not None:  # weights, config and tokenizer in one
        with as_input_error(f"{where}: {packed}"):
            return {"gguf": f"sha256:{content_digests().of_file(packed)}"}
    if not folder.is_dir():
        raise InputError(f"{where}: expected a hub id or a folder, got the file {str(folder)!r}; name its folder")
    digests = content_digests()
    with as_input_error(f"{where}: {folder}"):
        files = loaded_files(folder, with_code=model.trust_remote_code)
        kinds = files if field == "source" else {kind: files[kind] for kind in files if kind == "adapter"}
        return {kind: f"sha256:{digests.of_group(own, folder)}" for kind, own in kinds.items()}


def noise_between(base: Mapping[str, object], chat: Mapping[str, object]) -> float | None:
    """The noise that is the only difference of two models (0 for equal ones), from their identities; else None."""
    rest = {key: value for key, value in chat.items() if not key.startswith("weight_noise")}
    noise = chat.get("weight_noise", 0.0)
    return float(str(noise)) if rest == dict(base) else None


def adopted_identity(section: AdoptedCrosscoderSection) -> Identity:
    """Content of a local crosscoder, id and revision of the hub's; InputError where a path holds no weights."""
    identity: Identity = {"kind": section.kind, "activation_scale": section.activation_scale}
    contents = _published_contents(section.source, section.revision, f"crosscoder {section.name!r}: source")
    return identity | (
        {"source": section.source, "revision": section.revision} if contents is None else {"source": contents}
    )


def fitted_identity(section: CrosscoderSection) -> Identity:
    """What decides the weights of a fit; the content of the crosscoder that it begins with in place of its path."""
    identity = section.identity()
    if section.init_from is not None:
        contents = _published_contents(section.init_from, None, f"crosscoder {section.name!r}: init_from")
        identity["init_from"] = section.init_from if contents is None else contents
    return identity


def _published_contents(source: str, revision: str | None, where: str) -> list[str] | None:
    """Digests of a local crosscoder's files; None for a hub id. InputError where a path holds no weights."""
    path = existing_path(source)
    if path is not None:
        from pipeline.checkpoints.published import find_files  # imports torch, which other runs can do without

        try:
            files = find_files(path, revision=revision)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        with as_input_error(where):
            found = content_digests().of_files([file for file in files if file is not None])
        return [f"sha256:{digest[:DIGEST_LENGTH]}" for digest in found.values()]
    if source.startswith(("/", ".", "~")):
        raise InputError(
            f"{where}: expected a hub id, an existing folder or a weights file, got {short(source)}; correct the path"
        )
    return None


def steering_identity(section: SteeringSection) -> Identity:
    """The steering section with the content of the file of prompts in place of its path."""
    identity = section.model_dump(mode="json")
    if section.prompts_path is not None:
        where = "analyses.steering.prompts_path"
        identity["prompts_path"] = file_identity(section.prompts_path, where)
        # Steering comes last: prompts that it cannot read are refused before the start.
        prompts = read_json(section.prompts_path, where)
        parse_prompts(prompts, num_prompts=section.num_prompts, source=f"{where}: {section.prompts_path}")
    return identity
