"""The list of steps that a run file asks for, with the identity of each: the architecture in one place.

Nothing is executed or written here. Each step receives its own section, the steps it reads and the plain values it
needs; identities cover what was asked, never `resources`, `storage` or `tracking`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from pipeline.config.analyses import ControlsSection
from pipeline.config.crosscoder import AdoptedCrosscoderSection, CrosscoderSection
from pipeline.config.data import OrganismCorpus
from pipeline.config.resources import ModelWorkersSection
from pipeline.config.run_file import RunConfig
from pipeline.config.section import Section
from pipeline.errors import InputError
from pipeline.stages import (
    activations,
    adopt,
    autointerp,
    causality,
    controls,
    corpus,
    crosscoder,
    measurements,
    organism,
    report,
    steering,
    tokens,
)
from pipeline.stages.base import StageFunction, Step
from pipeline.stages.models import Loading, ModelLocation, locate_pair, model_identity
from pipeline.storage.artifacts import artifact_key, digest_of_path
from pipeline.text.files import as_input_error, expand_paths, read_text
from pipeline.text.templates import check_template


class Group(NamedTuple):
    """Steps that one stage makes together."""

    run: StageFunction
    steps: tuple[Step, ...]
    needs_cluster: bool = True
    keeps_parts: bool = False
    """Whether an unfinished artifact is worth keeping: the next run continues from it."""


def build_flow(config: RunConfig) -> tuple[Group, ...]:
    """The run's groups in the order of execution. Raises InputError where a local model or corpus is missing."""
    data = _data_steps(config)
    groups = [
        Group(_RUN[step.key.stage], (step,), keeps_parts=step.key.stage == activations.NAME) for step in data.values()
    ]
    fits = [_crosscoder_step(section, config, data) for section in config.crosscoders]
    adopted = tuple(step for step in fits if isinstance(step.section, AdoptedCrosscoderSection))
    if adopted:
        groups.append(Group(adopt.run, adopted, needs_cluster=False))
    if len(adopted) < len(fits):
        groups.append(Group(crosscoder.run, tuple(step for step in fits if step not in adopted)))
    measured = [_measurement_steps(config, fit, data) for fit in fits]
    if config.analyses.controls is not None:
        _add_controls(config.analyses.controls, fits, measured)
    rows = tuple(step for own in measured for step in own.values() if step.key.stage in measurements.STAGES)
    groups.append(Group(measurements.run, rows))
    for name, run in (("causality", causality.run), ("steering", steering.run), ("autointerp", autointerp.run)):
        steps = tuple(own[name] for own in measured if name in own)
        if steps:
            groups.append(Group(run, steps, keeps_parts=name == autointerp.NAME))
    groups.append(Group(report.run, (_report_step(config, groups, data),), needs_cluster=False))
    return tuple(groups)


_RUN: Mapping[str, StageFunction] = {
    organism.NAME: organism.run,
    corpus.NAME: corpus.run,
    tokens.NAME: tokens.run,
    activations.NAME: activations.run,
}


def _step(
    stage: str,
    version: int,
    section: Section,
    *,
    name: str = "",
    identity: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Step] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Step:
    """A step whose identity is its section (or `identity` in its place) and its inputs."""
    inputs = inputs or {}
    shown = section.model_dump(mode="json") if identity is None else identity
    key = artifact_key(stage, version, shown, {role: step.key.fingerprint for role, step in inputs.items()})
    return Step(f"{stage} {name}".strip(), key, section, inputs, extra or {})


def _data_steps(config: RunConfig) -> dict[str, Step]:
    """organism (where there is one), corpus, tokens, activations."""
    steps: dict[str, Step] = {}
    if config.organism is not None:
        steps["organism"] = _step(organism.NAME, organism.VERSION, config.organism)
    base = {"organism": steps["organism"]} if "organism" in steps else {}
    folder = steps["organism"].key.folder if base else ""
    models = {
        "base": model_identity(config.models.base, "models.base"),
        "chat": model_identity(config.models.chat, "models.chat"),
    }
    template = _chat_template(config)
    locations = locate_pair(config.models, folder, template)
    uses_organism = any(isinstance(source, OrganismCorpus) for source in config.corpus.sources)
    steps["corpus"] = _step(
        corpus.NAME,
        corpus.VERSION,
        config.corpus,
        identity=_corpus_identity(config),
        inputs=base if uses_organism else {},
    )
    weights = {source.name: source.weight for source in config.corpus.sources}
    steps["tokens"] = _step(
        tokens.NAME,
        tokens.VERSION,
        config.tokens,
        identity={
            **config.tokens.model_dump(mode="json"),
            "chat_template": template or None,
            "weights": weights,
            "models": models,
        },
        inputs={**base, "corpus": steps["corpus"]},
        extra={"weights": weights, "locations": locations},
    )
    pair = {"dtype": config.models.dtype, "attn_implementation": config.models.attn_implementation}
    steps["activations"] = _step(
        activations.NAME,
        activations.VERSION,
        config.activations,
        identity={**config.activations.model_dump(mode="json"), "models": models, **pair},
        inputs={**base, "tokens": steps["tokens"]},
        extra={"loading": _loading(config, locations, config.resources.extraction)},
    )
    return steps


def _loading(config: RunConfig, locations: tuple[ModelLocation, ModelLocation], pool: ModelWorkersSection) -> Loading:
    return Loading(locations, config.models.dtype, config.models.attn_implementation, pool.placement, pool.gpus)


def _corpus_identity(config: RunConfig) -> dict[str, Any]:
    """The corpus section with the content of files in place of their paths."""
    identity = config.corpus.model_dump(mode="json")
    for source in identity["sources"]:
        if "paths" in source:
            where = f"corpus {source['name']!r}: paths"
            source["paths"] = [_file_identity(path, where) for path in expand_paths(source["paths"], where)]
        del source["weight"]  # the token budget is the next stage's
    return identity


def _chat_template(config: RunConfig) -> str:
    """The text of tokens.chat_template, or "" where the tokenizer's own is used."""
    path = config.tokens.chat_template
    if path is None:
        return ""
    (file,) = expand_paths([path], "tokens.chat_template")
    text = read_text(file, "tokens.chat_template")
    check_template(text, f"tokens.chat_template: {path}")
    return text


def _file_identity(path: str, where: str) -> str:
    """The content of a local file, or URL and version of a distant one."""
    expand_paths([path], where)
    with as_input_error(f"{where}: {path}"):
        fs, inner = fsspec.core.url_to_fs(path)
        if "file" in fs.protocol:
            return f"sha256:{digest_of_path(Path(inner))}"
        return f"{path}#{fs.ukey(inner)}"


def _crosscoder_step(
    section: CrosscoderSection | AdoptedCrosscoderSection, config: RunConfig, data: Mapping[str, Step]
) -> Step:
    if isinstance(section, AdoptedCrosscoderSection):
        return _step(
            crosscoder.NAME,
            adopt.VERSION,
            section,
            name=section.name,
            identity=adopt.identity_of(section),
            inputs={"activations": data["activations"]},
            extra={"crosscoder": section.name},
        )
    # A name is for people: renaming trains nothing anew.
    identity = section.model_dump(mode="json", exclude={"name", "kind"})
    return _step(
        crosscoder.NAME,
        crosscoder.VERSION,
        section,
        name=section.name,
        identity={**identity, "training": config.training.model_dump(mode="json")},
        inputs={"activations": data["activations"]},
        extra={"training": config.training, "crosscoder": section.name},
    )


def _measurement_steps(config: RunConfig, fit: Step, data: Mapping[str, Step]) -> dict[str, Step]:
    """latents, and whichever of the other analyses is on, for one crosscoder."""
    analyses = config.analyses
    name = fit.extra["crosscoder"]
    locations = data["tokens"].extra["locations"]
    extra = {"crosscoder": name, "loading": _loading(config, locations, config.resources.analyses)}
    organism_input = {"organism": data["organism"]} if "organism" in data else {}
    inputs = {"crosscoder": fit, "activations": data["activations"]}
    steps = {
        "latents": _step(
            "latents", measurements.VERSION, analyses.latent_scaling, name=name, inputs=inputs, extra=extra
        )
    }
    with_latents = {**inputs, "latents": steps["latents"], "tokens": data["tokens"]}
    for stage, section in (("examples", analyses.examples), ("planted", analyses.planted)):
        if section is not None:
            steps[stage] = _step(stage, measurements.VERSION, section, name=name, inputs=with_latents, extra=extra)
    if analyses.causality is not None:
        steps["causality"] = _step(
            causality.NAME,
            causality.VERSION,
            analyses.causality,
            name=name,
            inputs={**with_latents, **organism_input},
            extra={**extra, "layer": config.activations.layer},
        )
    if analyses.steering is not None:
        planted = {"planted": steps["planted"]} if "planted" in steps else {}
        _check_steering(config, has_planted=bool(planted))
        steps["steering"] = _step(
            steering.NAME,
            steering.VERSION,
            analyses.steering,
            name=name,
            identity=_steering_identity(config),
            inputs={**with_latents, **organism_input, **planted},
            extra={**extra, "layer": config.activations.layer},
        )
    if analyses.autointerp is not None:
        if analyses.examples is None:
            raise InputError(
                "analyses.autointerp: expected analyses.examples to be on, since explanations are made from its "
                "contexts, got null; turn it on or set analyses.autointerp to null"
            )
        steps["autointerp"] = _step(
            autointerp.NAME,
            autointerp.VERSION,
            analyses.autointerp,
            name=name,
            inputs={**inputs, "latents": steps["latents"], "examples": steps["examples"]},
            extra={**extra, "window_tokens": analyses.examples.window_tokens},
        )
    return steps


def _add_controls(section: ControlsSection, fits: Sequence[Step], measured: Sequence[dict[str, Step]]) -> None:
    """The step `controls` of each crosscoder, which also reads those that differ from it in their seed alone."""
    for fit, own in zip(fits, measured, strict=True):
        latents = own["latents"]
        siblings = {
            other.extra["crosscoder"]: (other, theirs["latents"])
            for other, theirs in zip(fits, measured, strict=True)
            if controls.differ_in_seed(fit.section, other.section)
        }
        models = latents.inputs["activations"].key.identity["section"]["models"]
        own["controls"] = _step(
            controls.NAME,
            controls.VERSION,
            section,
            name=fit.extra["crosscoder"],
            inputs={
                **latents.inputs,
                "latents": latents,
                **{f"crosscoder {name}": other for name, (other, _) in siblings.items()},
                **{f"latents {name}": theirs for name, (_, theirs) in siblings.items()},
            },
            extra={
                "crosscoder": fit.extra["crosscoder"],
                "noise": controls.noise_of(models["base"], models["chat"]),
                "seeds": tuple(siblings),
            },
        )


def _steering_identity(config: RunConfig) -> dict[str, Any]:
    assert config.analyses.steering is not None
    identity = config.analyses.steering.model_dump(mode="json")
    if identity["prompts_path"] is not None:
        identity["prompts_path"] = _file_identity(identity["prompts_path"], "analyses.steering.prompts_path")
    return identity


def _check_steering(config: RunConfig, *, has_planted: bool) -> None:
    assert config.analyses.steering is not None
    if config.analyses.steering.prompts_path is None and config.organism is None:
        raise InputError(
            "analyses.steering.prompts_path: expected a file of prompts, since the run has no organism; "
            "give one or set analyses.steering to null"
        )
    steering = config.analyses.steering
    if not steering.latents and not steering.num_latents and not has_planted:
        raise InputError(
            "analyses.steering.latents: expected latents to steer with, since analyses.planted is off; name some, set "
            "num_latents, or turn analyses.planted on"
        )


def _report_step(config: RunConfig, groups: list[Group], data: Mapping[str, Step]) -> Step:
    """The report reads everything, so that its lineage is complete."""
    steps = [step for group in groups for step in group.steps]
    return _step(
        report.NAME,
        report.VERSION,
        config.analyses,
        identity={"name": config.name, "crosscoders": [section.name for section in config.crosscoders]},
        inputs={step.name: step for step in steps},
        extra={"settings": config.model_dump(mode="json"), "locations": data["tokens"].extra["locations"]},
    )
