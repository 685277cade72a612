"""What a run refuses before it computes anything: models that do not load, halves that are not the model, workers that
the cluster cannot hold.

`check_models` needs no cluster: it reads configurations, tokenizers and what weights say about themselves, and `plan`
calls it too. `check_halves` runs both models on a few tokens in a worker. Nothing is asked about steps that are done.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.cluster.connect import check_fits, request
from pipeline.config.resources import ResourcesSection, TrainingResources, WorkersSection
from pipeline.errors import InputError
from pipeline.models.decoder import check_layer
from pipeline.models.loading import check_model, check_pair, is_config_alone, is_local
from pipeline.models.verification import Part
from pipeline.organisms.build import spec_of
from pipeline.stages import halves
from pipeline.stages.adopt import read_checkpoint
from pipeline.stages.catalogue import (
    ActivationsInputs,
    AdoptedCrosscoderInputs,
    CausalityInputs,
    EvidenceInputs,
    FittedCrosscoderInputs,
    LayersInputs,
    LogitLensInputs,
    OrganismInputs,
    SteeringInputs,
)
from pipeline.stages.locations import Loading
from pipeline.stages.models import model_spec

if TYPE_CHECKING:
    from pipeline.run.flow import AnyStep
    from pipeline.storage.filesystem import Storage
    from pipeline.terminal import Reporter

_SECTIONS = {
    "tokens": "tokens",
    "activations": "extraction",
    "crosscoder": "training",
    "evidence": "analyses",
    "latents": "analyses",
    "logit_lens": "analyses",
    "causality": "analyses",
    "steering": "analyses",
    "layers": "analyses",
}
"""Section of `resources` with the workers of a stage."""


def check_models(
    loading: Loading, crosscoders: "Sequence[AnyStep]" = (), *, address: str = "local", only_local: bool = False
) -> None:
    """InputError for a pair that cannot be loaded or does not fit, or an adopted crosscoder of another width.

    address: of the cluster, whose workers have packages of their own where it is not this machine. only_local: models
    on the hub are not asked for, so that nothing waits for a network, nor folders that hold a configuration alone.

    The organism's pair fits by construction, apart from the layer (`check_organism`); its width is known, and compared
    with an adopted crosscoder's, when it is built.
    """
    if any(location.folder for location in loading.models):
        return
    base, chat = (model_spec(location) for location in loading.models)
    if only_local and not all(is_local(spec) and not is_config_alone(spec) for spec in (base, chat)):
        return
    pair = check_pair(base, chat, layer=loading.layer)
    is_used_here = address == "local" or loading.gpus == 0
    for spec in dict.fromkeys((base, chat)):
        check_model(spec, attn_implementation=loading.attn_implementation, is_used_here=is_used_here)
    for step in crosscoders:
        if isinstance(step.inputs, AdoptedCrosscoderInputs):
            read_checkpoint(step.inputs.section, pair.activation_dim)


def check_organism(missing: "Sequence[AnyStep]", layer: int) -> None:
    """InputError where a generated pair that is yet to be built will not have the layer, counted from 0."""
    for inputs in (step.inputs for step in missing):
        if isinstance(inputs, OrganismInputs):
            size = spec_of(inputs.section.size).model
            check_layer(layer, size.num_layers, f"the organism of size {inputs.section.size!r}")


def check_halves(
    missing: "Sequence[AnyStep]", storage: "Storage", resources: ResourcesSection, reporter: "Reporter"
) -> None:
    """InputError where a half of a model is not what the missing steps need of it; a cluster must be there."""
    asked: dict[Part, Loading] = {}
    directions: Loading | None = None
    for inputs in (step.inputs for step in missing):
        if isinstance(inputs, EvidenceInputs | CausalityInputs | SteeringInputs | LayersInputs):
            asked["logits"] = inputs.loading
        if isinstance(inputs, SteeringInputs):
            asked["answers"] = inputs.loading
        if isinstance(inputs, ActivationsInputs):
            asked["rows"] = inputs.loading
        if isinstance(inputs, FittedCrosscoderInputs) and inputs.activations.inputs.section.mode == "stream":
            asked["rows"] = inputs.activations.inputs.loading
        if isinstance(inputs, LogitLensInputs):
            directions = inputs.loading
    whole = asked.get("logits", directions)
    loading = asked.get("rows") if whole is None else whole
    if loading is None or any(location.folder for location in loading.models):
        return
    name, section = ("extraction", resources.extraction) if whole is None else ("analyses", resources.analyses)
    parts: tuple[Part, ...] = ("rows", *(part for part in ("logits", "answers") if part in asked))
    about = halves.Asked(
        parts,
        is_of_every_layer=any(isinstance(step.inputs, LayersInputs) for step in missing),
        reads_directions=directions is not None,
    )
    reporter.message("models: loading both and comparing their halves with the library's own forward on a few tokens")
    halves.check(storage, loading, about, name=name, section=section)


def check_local_resources(missing: "Sequence[AnyStep]", resources: ResourcesSection) -> None:
    """As `check_resources` for a cluster that is yet to be started on this machine."""
    if resources.cluster.address != "local" or resources.cluster.autoscales or _is_joined():
        return
    asked_gpus = any(getattr(resources, name).gpus for name in _wanted(missing))
    there = {
        "CPU": float(resources.cluster.num_cpus or os.cpu_count() or 1),
        "GPU": float(_num_gpus()) if asked_gpus else 0.0,
    }

    def check(name: str, each: Mapping[str, float], workers: int) -> None:
        for kind, amount in each.items():
            if amount * workers > there.get(kind, 0.0) + 1e-9:
                raise InputError(
                    f"resources.{name}: expected at most the {there.get(kind, 0.0):g} {kind} of this machine, got "
                    f"{amount * workers:g} ({workers} workers); ask for less, or join a cluster with "
                    "resources.cluster.address"
                )

    _check_all(missing, resources, check)


def check_resources(missing: "Sequence[AnyStep]", resources: ResourcesSection) -> None:
    """InputError where the cluster that was joined can never hold the workers that missing steps ask for."""
    _check_all(missing, resources, check_fits)


def _check_all(
    missing: "Sequence[AnyStep]",
    resources: ResourcesSection,
    check: Callable[[str, Mapping[str, float], int], None],
) -> None:
    for name in _wanted(missing):
        section: WorkersSection | TrainingResources = getattr(resources, name)
        if isinstance(section, TrainingResources):
            check(name, request(section, section.cpus or 0.0), (section.min_data or section.data) * section.latent)
        else:
            # CPUs are given out in shares where a worker asks for more than a node has; GPUs are not.
            asked = {kind: amount for kind, amount in request(section, section.cpus).items() if kind != "CPU"}
            first = getattr(section, "min_workers", None) or section.workers or 1
            check(name, asked, first)
            if first > 1:
                check(name, {"CPU": section.cpus}, first)


def _wanted(missing: "Sequence[AnyStep]") -> list[str]:
    return list(dict.fromkeys(_SECTIONS[step.key.stage] for step in missing if step.key.stage in _SECTIONS))


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _is_joined() -> bool:
    """Whether this process is on a cluster already, as a job is."""
    import sys

    return "ray" in sys.modules and sys.modules["ray"].is_initialized()
