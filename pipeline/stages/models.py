"""Where the two models come from: the organism's artifact, a local folder or the hub.

A `ModelLocation` is plain and travels to any worker; `local_specs` makes ModelSpecs of both for as long as they are
read.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.data import HubModel, ModelsSection, OrganismModel
from pipeline.errors import InputError
from pipeline.models.loading import LoadOptions, ModelSpec
from pipeline.models.pair import ModelPair
from pipeline.models.placement import Placement
from pipeline.storage.artifacts import digest_of_path
from pipeline.storage.filesystem import Storage


class ModelLocation(NamedTuple):
    """A model that may lie in the storage."""

    spec: ModelSpec
    """With an empty source if the model lies in the storage."""
    folder: str
    """Key of its folder in the storage, or empty."""
    shown: str
    """How tables name it."""


def locate(model: HubModel | OrganismModel, organism_folder: str, chat_template: str = "") -> ModelLocation:
    """The location of a configured model; `organism_folder` is the key of the run's organism, or empty.

    `chat_template` (text) takes the place of the tokenizer's own.
    """
    noise: dict[str, Any] = {"weight_noise": model.weight_noise, "weight_noise_seed": model.weight_noise_seed}
    shown_noise = f" + noise {model.weight_noise:g}" if model.weight_noise else ""
    if isinstance(model, OrganismModel):
        spec = ModelSpec("", None, None, False, chat_template=chat_template, **noise)
        return ModelLocation(spec, f"{organism_folder}/{model.member}", f"organism {model.member}{shown_noise}")
    spec = ModelSpec(
        model.source,
        model.revision,
        model.adapter,
        model.trust_remote_code,
        tuple(sorted(model.token_replacements.items())),
        chat_template=chat_template,
        adapter_revision=model.adapter_revision,
        **noise,
    )
    shown = (
        model.source
        + (f"@{model.revision}" if model.revision else "")
        + (f" + {model.adapter}" if model.adapter else "")
        + shown_noise
    )
    return ModelLocation(spec, "", shown)


def locate_pair(
    section: ModelsSection, organism_folder: str, chat_template: str = ""
) -> tuple[ModelLocation, ModelLocation]:
    """Locations of base and chat; both carry the template, so that equal models stay equal."""
    base, chat = (locate(model, organism_folder, chat_template) for model in (section.base, section.chat))
    return base, chat


def model_identity(model: HubModel | OrganismModel, where: str) -> dict[str, Any]:
    """What a fingerprint says of a model: content of local files, id and revision of the hub's, replaced token ids.

    The organism's models are identified by the organism artifact among the step's inputs. Raises InputError where a
    source that looks like a path is missing.
    """
    names = ("weight_noise", "weight_noise_seed")
    identity: dict[str, Any] = {name: getattr(model, name) for name in names} if model.weight_noise else {}
    if isinstance(model, OrganismModel):
        return {"organism": model.member, **identity}
    sources = (("source", model.source, model.revision), ("adapter", model.adapter, model.adapter_revision))
    for field, source, revision in sources:
        if source is None:
            continue
        path = Path(source).expanduser()
        if path.exists():
            identity[field] = f"sha256:{digest_of_path(path)}"
        elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise InputError(
                f"{where}.{field}: expected a hub id or an existing folder, got {source!r}; correct the path"
            )
        else:
            identity[field] = source
            identity[f"{field}_revision"] = revision
    if model.token_replacements:
        identity["token_replacements"] = sorted(model.token_replacements.items())
    return identity


@contextmanager
def local_specs(storage: Storage, *locations: ModelLocation) -> Iterator[tuple[ModelSpec, ...]]:
    """ModelSpecs that can be loaded on this machine; copies from an object store live as long as the block."""
    with ExitStack() as stack:
        specs = []
        for location in locations:
            if location.folder:
                folder = stack.enter_context(storage.local_folder(location.folder))
                specs.append(location.spec._replace(source=str(folder)))
            else:
                specs.append(location.spec)
        yield tuple(specs)


class Loading(NamedTuple):
    """What a worker needs to load the pair."""

    locations: tuple[ModelLocation, ModelLocation]
    dtype: str
    attn_implementation: str | None
    placement: Placement
    gpus: float
    """Of the worker; 0 loads onto the CPU."""


def load_pair(storage: Storage, loading: Loading, *, layer: int, is_lower_only: bool = False) -> ModelPair:
    """Both models in this process; only layers 1..L where nothing above is needed."""
    options = LoadOptions(
        layer=layer,
        dtype=loading.dtype,
        devices=worker_devices(loading.gpus, loading.placement),
        placement=loading.placement,
        attn_implementation=loading.attn_implementation,
        is_lower_only=is_lower_only,
    )
    with local_specs(storage, *loading.locations) as (base, chat):
        return ModelPair.load(base, chat, options)


def worker_devices(gpus: float, placement: Placement) -> tuple[str, ...]:
    """Devices of a worker as it names them: Ray shows it its own GPUs alone, counted from 0."""
    if gpus == 0:
        return ("cpu",) if placement == "one_device" else ("cpu", "cpu")
    return tuple(f"cuda:{index}" for index in range(max(1, int(gpus))))
