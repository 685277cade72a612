"""The list of steps that a run file asks for, with the identity of each: the architecture in one place.

Nothing is executed or written here. Each step receives typed inputs (stages/catalogue.py): its own section, the steps
that it reads and the values that it needs. Identities cover what was asked, never `resources`, `storage` or `tracking`.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple, TypeVar

from pipeline.config.crosscoder import AdoptedCrosscoderSection, CrosscoderSection, InjectedCrosscoderSection
from pipeline.config.data import CorpusSource, OrganismCorpus
from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.run.identities import (
    Identity,
    adopted_identity,
    corpus_identity,
    fitted_identity,
    model_identity,
    noise_between,
    steering_identity,
)
from pipeline.stages.catalogue import (
    ActivationsInputs,
    AdoptedCrosscoderInputs,
    AutointerpInputs,
    CausalityInputs,
    ControlsInputs,
    CorpusInputs,
    CrosscoderStep,
    CrosscoderSteps,
    DataSteps,
    EvidenceInputs,
    ExamplesInputs,
    FittedCrosscoderInputs,
    LatentsInputs,
    LayersInputs,
    LogitLensInputs,
    OrganismInputs,
    PlantedInputs,
    ReportInputs,
    SteeringInputs,
    TokensInputs,
)
from pipeline.stages.locations import Loading, ModelPairLocation, locate
from pipeline.stages.step import StageContext, StageInputs, Step
from pipeline.storage.artifacts import artifact_key
from pipeline.text.files import expand_paths, read_text

AnyStep = Step[StageInputs]
_Kept = TypeVar("_Kept")
_Inputs = TypeVar("_Inputs", bound=StageInputs)


class Group(NamedTuple):
    """Steps that one stage file makes together."""

    module: str
    """Name of the file in stages/."""
    steps: tuple[AnyStep, ...]
    needs_cluster: bool = True
    keeps_parts: bool = False
    """Whether the next run continues from an unfinished artifact, so that it is kept after a refusal."""

    def run(self, steps: Sequence[AnyStep], context: StageContext) -> None:
        """Make some of the steps. The stage is imported only now, since its libraries take seconds to load."""
        import_module(f"pipeline.stages.{self.module}").run(steps, context)


class Flow(NamedTuple):
    """All steps of a run, by what they are about."""

    data: DataSteps
    crosscoders: tuple[CrosscoderSteps, ...]
    replicas: tuple[Step[LatentsInputs], ...]
    """Latent tables of further seeds, which the controls of their crosscoders read."""
    report: Step[ReportInputs]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The steps in the order of execution, grouped by the stage file that makes them."""
        organism, corpus, tokens, activations, evidence = self.data
        crosscoders = [own.crosscoder for own in self.crosscoders]
        crosscoders += [own.inputs.crosscoder for own in self.replicas]
        adopted = [step for step in crosscoders if isinstance(step.inputs, AdoptedCrosscoderInputs)]
        fitted = [step for step in crosscoders if isinstance(step.inputs, FittedCrosscoderInputs)]
        rows = [step for own in self.crosscoders for step in (own.latents, own.examples, own.planted, own.controls)]
        rows += self.replicas
        groups = (
            Group("organism", _present([organism])),
            Group("corpus", (corpus,)),
            Group("tokens", (tokens,)),
            Group("activations", (activations,), keeps_parts=True),
            Group("evidence", _present([evidence])),
            Group("adopt", _present(adopted), needs_cluster=False),
            Group("crosscoder", _present(fitted)),
            Group("measurements", _present(rows)),
            Group("logit_lens", _present([own.logit_lens for own in self.crosscoders])),
            Group("causality", _present([own.causality for own in self.crosscoders])),
            Group("steering", _present([own.steering for own in self.crosscoders])),
            Group("autointerp", _present([own.autointerp for own in self.crosscoders]), keeps_parts=True),
            Group("report", (self.report,), needs_cluster=False),
        )
        return tuple(group for group in groups if group.steps)

    @property
    def steps(self) -> tuple[AnyStep, ...]:
        """All steps in the order of execution."""
        return tuple(step for group in self.groups for step in group.steps)


def _present(steps: Sequence[_Kept | None]) -> tuple[_Kept, ...]:
    return tuple(step for step in steps if step is not None)


class LayersFlow(NamedTuple):
    """The steps that lead to the curve over layers; they need no layer."""

    groups: tuple[Group, ...]
    layers: Step[LayersInputs]


def build_layers_flow(config: RunConfig) -> LayersFlow:
    """The steps up to the curve over layers, the same as the run's own. Raises InputError as `build_flow`."""
    text = _text_steps(config)
    layers = _layers_step(config, text)
    groups = (
        Group("organism", _present([text.organism])),
        Group("corpus", (text.corpus,)),
        Group("tokens", (text.tokens,)),
        Group("layers", (layers,)),
    )
    return LayersFlow(tuple(group for group in groups if group.steps), layers)


def build_flow(config: RunConfig) -> Flow:
    """The run's steps. Raises InputError where a local model or corpus is missing, or the layer is not measured yet."""
    _check_analyses(config)
    text = _text_steps(config)
    models, data = text.models, _data_steps(config, text)
    latents, replicas = (
        [_step(_latents_inputs(section, config, data), crosscoder_name=section.name) for section in sections]
        for sections in (config.crosscoders, config.replicas)
    )
    noise = noise_between(models["base"], models["chat"])
    measured = tuple(_analysis_steps(config, own, latents, replicas, noise) for own in latents)
    report = _step(
        ReportInputs(
            section=config.analyses,
            data=data,
            # Adopted crosscoders come first on the page.
            crosscoders=tuple(sorted(measured, key=lambda own: own.crosscoder.inputs.section.kind != "adopted")),
            layers=_layers_step(config, text),
            run_settings=config.model_dump(mode="json"),
        ),
        identity={"name": config.name, "crosscoders": [section.name for section in config.crosscoders]},
    )
    return Flow(data, measured, tuple(replicas), report)


def _latents_inputs(
    section: CrosscoderSection | AdoptedCrosscoderSection, config: RunConfig, data: DataSteps
) -> LatentsInputs:
    # Rows with planted concepts differ, whatever the models do.
    evidence = None if isinstance(section, InjectedCrosscoderSection) else data.evidence
    crosscoder = _crosscoder_step(section, config, data)
    return LatentsInputs(section=config.analyses.latent_scaling, crosscoder=crosscoder, evidence=evidence)


def _step(inputs: _Inputs, *, crosscoder_name: str = "", identity: Identity | None = None) -> Step[_Inputs]:
    """A step whose identity is its section (or `identity` in its place) and what it reads."""
    section = inputs.section.model_dump(mode="json") if identity is None else identity
    read = {role: step.key.fingerprint for role, step in inputs.reads().items()}
    return Step(artifact_key(inputs.NAME, inputs.VERSION, section, read), inputs, crosscoder_name)


class _TextSteps(NamedTuple):
    """What a run needs of models and texts before a layer is chosen."""

    models: Mapping[str, Identity]
    pair: ModelPairLocation
    organism: Step[OrganismInputs] | None
    corpus: Step[CorpusInputs]
    tokens: Step[TokensInputs]


def _text_steps(config: RunConfig) -> _TextSteps:
    models = {
        "base": model_identity(config.models.base, "models.base"),
        "chat": model_identity(config.models.chat, "models.chat"),
    }
    organism = None if config.organism is None else _step(OrganismInputs(section=config.organism))
    template = _chat_template(config)
    folder = "" if organism is None else organism.folder
    pair = ModelPairLocation(locate(config.models.base, folder, template), locate(config.models.chat, folder, template))
    reads_organism = any(isinstance(source, OrganismCorpus) for source in config.corpus.sources)
    corpus = _step(
        CorpusInputs(section=config.corpus, organism=organism if reads_organism else None),
        identity=corpus_identity(config.corpus),
    )
    weights = {source.name: source.weight for source in config.corpus.sources}
    about_tokens: Identity = {"chat_template": template or None, "weights": weights, "models": models}
    tokens = _step(
        TokensInputs(section=config.tokens, organism=organism, corpus=corpus, models=pair, weights=weights),
        identity=config.tokens.model_dump(mode="json") | about_tokens,
    )
    return _TextSteps(models, pair, organism, corpus, tokens)


def _layers_step(config: RunConfig, text: _TextSteps) -> Step[LayersInputs]:
    pool = config.resources.analyses
    loading = _loading(config, text, layer=0)._replace(placement=pool.placement, gpus=pool.gpus)
    rows = config.activations.model_dump(mode="json", include={"drop_first_tokens", "drop_bos", "norm_cap"})
    return _step(
        LayersInputs(
            section=config.analyses.layers,
            rows=config.activations,
            organism=text.organism,
            tokens=text.tokens,
            loading=loading,
        ),
        identity=config.analyses.layers.model_dump(mode="json") | rows | _about_models(config, text),
    )


def _loading(config: RunConfig, text: _TextSteps, *, layer: int) -> Loading:
    models, pool = config.models, config.resources.extraction
    return Loading(text.pair, layer, models.dtype, models.attn_implementation, pool.placement, pool.gpus)


def _about_models(config: RunConfig, text: _TextSteps) -> Identity:
    models = config.models
    return {"models": text.models, "dtype": models.dtype, "attn_implementation": models.attn_implementation}


def _data_steps(config: RunConfig, text: _TextSteps) -> DataSteps:
    loading = _loading(config, text, layer=config.activations.layer_number)
    activations = _step(
        ActivationsInputs(section=config.activations, organism=text.organism, tokens=text.tokens, loading=loading),
        identity=config.activations.model_dump(mode="json") | _about_models(config, text),
    )
    evidence = _evidence_step(config, activations)
    return DataSteps(text.organism, text.corpus, text.tokens, activations, evidence)


def _evidence_step(config: RunConfig, activations: Step[ActivationsInputs]) -> Step[EvidenceInputs] | None:
    section, pool = config.analyses.evidence, config.resources.analyses
    if section is None:
        return None
    loading = activations.inputs.loading._replace(placement=pool.placement, gpus=pool.gpus)
    return _step(EvidenceInputs(section=section, activations=activations, loading=loading))


def _chat_template(config: RunConfig) -> str:
    """The text of tokens.chat_template, or "" where the tokenizer's own is used."""
    path = config.tokens.chat_template
    if path is None:
        return ""
    from pipeline.text.templates import check_template  # imports jinja2, which other runs can do without

    (file,) = expand_paths([path], "tokens.chat_template")
    text = read_text(file, "tokens.chat_template")
    check_template(text, f"tokens.chat_template: {path}")
    return text


def _crosscoder_step(
    section: CrosscoderSection | AdoptedCrosscoderSection, config: RunConfig, data: DataSteps
) -> CrosscoderStep:
    if isinstance(section, AdoptedCrosscoderSection):
        return _step(
            AdoptedCrosscoderInputs(section=section, activations=data.activations),
            crosscoder_name=section.name,
            identity=adopted_identity(section),
        )
    return _step(
        FittedCrosscoderInputs(section=section, activations=data.activations, training=config.training),
        crosscoder_name=section.name,
        identity={**fitted_identity(section), "training": config.training.model_dump(mode="json")},
    )


def _other_seeds(own: Step[LatentsInputs], every: Sequence[Step[LatentsInputs]]) -> tuple[Step[LatentsInputs], ...]:
    """Latent tables of the crosscoders that differ from one in their seed alone."""
    section = own.inputs.crosscoder.inputs.section
    if not isinstance(section, CrosscoderSection):
        return ()
    return tuple(other for other in every if section.differs_in_seed_alone(other.inputs.crosscoder.inputs.section))


def _injected(own: Step[LatentsInputs], replicas: Sequence[Step[LatentsInputs]]) -> Step[LatentsInputs] | None:
    """The latent table of the fit on rows with planted concepts that belongs to a crosscoder."""
    section = own.inputs.crosscoder.inputs.section
    injected = section.injected() if isinstance(section, CrosscoderSection) else None
    return next((other for other in replicas if other.inputs.crosscoder.inputs.section == injected), None)


def _analysis_steps(
    config: RunConfig,
    latents: Step[LatentsInputs],
    every: Sequence[Step[LatentsInputs]],
    replicas: Sequence[Step[LatentsInputs]],
    noise: float | None,
) -> CrosscoderSteps:
    """Whichever analyses are on, for one of `every` crosscoder; `replicas` are further seeds of any of them."""
    on, name = config.analyses, latents.crosscoder_name
    pool = config.resources.analyses
    other_seeds = _other_seeds(latents, [*every, *replicas])
    loading = latents.inputs.activations.inputs.loading._replace(placement=pool.placement, gpus=pool.gpus)
    examples = planted = controls = logit_lens = causality = steering = autointerp = None
    if on.examples is not None:
        examples = _step(ExamplesInputs(section=on.examples, latents=latents), crosscoder_name=name)
    if on.planted is not None:
        planted = _step(PlantedInputs(section=on.planted, latents=latents), crosscoder_name=name)
    if on.controls is not None:
        about_controls = ControlsInputs(
            section=on.controls,
            latents=latents,
            other_seeds=other_seeds,
            injected=_injected(latents, replicas),
            noise=noise,
        )
        controls = _step(about_controls, crosscoder_name=name)
    if on.logit_lens is not None:
        logit_lens = _step(
            LogitLensInputs(section=on.logit_lens, latents=latents, loading=loading), crosscoder_name=name
        )
    if on.causality is not None:
        compared = tuple(other for other in every if other is not latents)
        compared = compared if on.causality.set_size == "larger_class" else ()
        about_causality = CausalityInputs(section=on.causality, latents=latents, loading=loading, compared=compared)
        causality = _step(about_causality, crosscoder_name=name)
    if on.steering is not None:
        about_steering = SteeringInputs(section=on.steering, latents=latents, planted=planted, loading=loading)
        steering = _step(about_steering, crosscoder_name=name, identity=steering_identity(on.steering))
    if on.autointerp is not None and examples is not None:
        about_autointerp = AutointerpInputs(section=on.autointerp, latents=latents, examples=examples)
        autointerp = _step(about_autointerp, crosscoder_name=name)
    crosscoder = latents.inputs.crosscoder
    return CrosscoderSteps(
        crosscoder=crosscoder,
        latents=latents,
        examples=examples,
        planted=planted,
        controls=controls,
        logit_lens=logit_lens,
        causality=causality,
        steering=steering,
        autointerp=autointerp,
    )


def _check_analyses(config: RunConfig) -> None:
    """InputError where an analysis lacks what it needs of the rest of the run file."""
    analyses, steering = config.analyses, config.analyses.steering
    if steering is not None and steering.prompts_path is None and config.organism is None:
        raise InputError(
            "analyses.steering.prompts_path: expected a file of prompts, since the run has no organism, got null; "
            "give one or set analyses.steering to null"
        )
    if steering is not None and not (steering.latents or steering.num_latents or analyses.planted):
        raise InputError(
            "analyses.steering.latents: expected latents to steer with, since analyses.planted is off; name some, set "
            "num_latents, or turn analyses.planted on"
        )
    if analyses.causality is not None and not any(_has_dialogues(source) for source in config.corpus.sources):
        names = ", ".join(source.name for source in config.corpus.sources)
        raise InputError(
            f"analyses.causality: expected a corpus of dialogues, got plain documents alone ({names}); add a corpus "
            "with messages_column or set analyses.causality to null"
        )
    if analyses.autointerp is not None and analyses.examples is None:
        raise InputError(
            "analyses.autointerp: expected analyses.examples to be on, since explanations are made from its contexts, "
            "got null; turn it on or set analyses.autointerp to null"
        )


def _has_dialogues(source: CorpusSource) -> bool:
    if isinstance(source, OrganismCorpus):
        return source.part == "dialogues"
    return getattr(source, "messages_column", None) is not None
