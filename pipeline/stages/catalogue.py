"""Every stage in the order of the flow: its name, its VERSION and all that it needs to make one artifact.

run/flow.py fills these classes from the run file; each stage's file reads them and nothing else. A field that holds a
step is an artifact that the stage reads, and its name is the role under which the step's fingerprint enters the
identity of what is made. The classes stand here and not beside the stages because those import torch, Ray and pandas,
which nobody must load to see that a run is finished.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.config.analyses import (
    AnalysesSection,
    AutointerpSection,
    CausalitySection,
    ControlsSection,
    ExamplesSection,
    LatentScalingSection,
    PlantedSection,
    SteeringSection,
)
from pipeline.config.crosscoder import AdoptedCrosscoderSection, CrosscoderSection, TrainingSection
from pipeline.config.data import ActivationsSection, CorpusSection, OrganismSection, TokensSection
from pipeline.stages.locations import Loading, ModelLocation, ModelPairLocation
from pipeline.stages.step import StageInputs, Step


@dataclass(frozen=True, kw_only=True)
class OrganismInputs(StageInputs):
    """A generated model pair with its texts and prompts."""

    NAME = "organism"
    VERSION = 1
    section: OrganismSection


@dataclass(frozen=True, kw_only=True)
class CorpusInputs(StageInputs):
    """Documents of all sources."""

    NAME = "corpus"
    VERSION = 2
    section: CorpusSection
    organism: Step[OrganismInputs] | None
    """Where a source is the organism's."""


@dataclass(frozen=True, kw_only=True)
class TokensInputs(StageInputs):
    """Token ids that both models read."""

    NAME = "tokens"
    VERSION = 2
    section: TokensSection
    organism: Step[OrganismInputs] | None
    corpus: Step[CorpusInputs]
    models: ModelPairLocation
    weights: Mapping[str, float]
    """Share of the token budget by corpus, not normalised."""


@dataclass(frozen=True, kw_only=True)
class ActivationsInputs(StageInputs):
    """Residual-stream rows of both models after layer L."""

    NAME = "activations"
    VERSION = 3
    section: ActivationsSection
    organism: Step[OrganismInputs] | None
    tokens: Step[TokensInputs]
    loading: Loading


@dataclass(frozen=True, kw_only=True)
class FittedCrosscoderInputs(StageInputs):
    """A crosscoder that the run fits."""

    NAME = "crosscoder"
    VERSION = 1
    section: CrosscoderSection
    activations: Step[ActivationsInputs]
    training: TrainingSection


@dataclass(frozen=True, kw_only=True)
class AdoptedCrosscoderInputs(StageInputs):
    """A crosscoder from elsewhere."""

    NAME = "crosscoder"
    VERSION = 1
    section: AdoptedCrosscoderSection
    activations: Step[ActivationsInputs]


CrosscoderStep = Step[FittedCrosscoderInputs] | Step[AdoptedCrosscoderInputs]


@dataclass(frozen=True, kw_only=True)
class LatentsInputs(StageInputs):
    """The latent table: Latent Scaling, ownership and verdict."""

    NAME = "latents"
    VERSION = 4
    section: LatentScalingSection
    crosscoder: CrosscoderStep
    activations: Step[ActivationsInputs]


@dataclass(frozen=True, kw_only=True)
class ExamplesInputs(StageInputs):
    """Contexts in which latents fire."""

    NAME = "examples"
    VERSION = 4
    section: ExamplesSection
    crosscoder: CrosscoderStep
    activations: Step[ActivationsInputs]
    latents: Step[LatentsInputs]
    tokens: Step[TokensInputs]
    chat: ModelLocation
    """Its tokenizer gives the texts."""


@dataclass(frozen=True, kw_only=True)
class PlantedInputs(StageInputs):
    """Latents scored by planted labels."""

    NAME = "planted"
    VERSION = 4
    section: PlantedSection
    crosscoder: CrosscoderStep
    activations: Step[ActivationsInputs]
    latents: Step[LatentsInputs]
    tokens: Step[TokensInputs]


class OtherSeed(NamedTuple):
    """A crosscoder of the run that differs from another one in its seed alone."""

    name: str
    crosscoder: CrosscoderStep
    latents: Step[LatentsInputs]


@dataclass(frozen=True, kw_only=True)
class ControlsInputs(StageInputs):
    """Controls of a crosscoder's verdict."""

    NAME = "controls"
    VERSION = 3
    section: ControlsSection
    crosscoder: CrosscoderStep
    activations: Step[ActivationsInputs]
    latents: Step[LatentsInputs]
    other_seeds: tuple[OtherSeed, ...]
    noise: float | None
    """The weight noise that alone tells the two models apart, 0 for equal models; None where they differ otherwise."""

    def reads(self) -> dict[str, Step[StageInputs]]:
        """The other seeds too, under their names."""
        roles = super().reads()
        for other in self.other_seeds:
            roles |= {f"crosscoder {other.name}": other.crosscoder, f"latents {other.name}": other.latents}
        return roles


@dataclass(frozen=True, kw_only=True)
class CausalityInputs(StageInputs):
    """KL of interventions."""

    NAME = "causality"
    VERSION = 2
    section: CausalitySection
    organism: Step[OrganismInputs] | None
    crosscoder: CrosscoderStep
    activations: Step[ActivationsInputs]
    latents: Step[LatentsInputs]
    tokens: Step[TokensInputs]
    loading: Loading


@dataclass(frozen=True, kw_only=True)
class SteeringInputs(StageInputs):
    """Answers under steering."""

    NAME = "steering"
    VERSION = 2
    section: SteeringSection
    organism: Step[OrganismInputs] | None
    crosscoder: CrosscoderStep
    activations: Step[ActivationsInputs]
    latents: Step[LatentsInputs]
    tokens: Step[TokensInputs]
    planted: Step[PlantedInputs] | None
    loading: Loading


@dataclass(frozen=True, kw_only=True)
class AutointerpInputs(StageInputs):
    """Explanations of latents by a language model."""

    NAME = "autointerp"
    VERSION = 1
    section: AutointerpSection
    crosscoder: CrosscoderStep
    activations: Step[ActivationsInputs]
    latents: Step[LatentsInputs]
    examples: Step[ExamplesInputs]


class DataSteps(NamedTuple):
    """What all crosscoders share."""

    organism: Step[OrganismInputs] | None
    corpus: Step[CorpusInputs]
    tokens: Step[TokensInputs]
    activations: Step[ActivationsInputs]


class CrosscoderSteps(NamedTuple):
    """A crosscoder and its analyses; None where the run file turns one off."""

    crosscoder: CrosscoderStep
    latents: Step[LatentsInputs]
    examples: Step[ExamplesInputs] | None
    planted: Step[PlantedInputs] | None
    controls: Step[ControlsInputs] | None
    causality: Step[CausalityInputs] | None
    steering: Step[SteeringInputs] | None
    autointerp: Step[AutointerpInputs] | None


@dataclass(frozen=True, kw_only=True)
class ReportInputs(StageInputs):
    """The page and the verdict table; they read every artifact of the run."""

    NAME = "report"
    VERSION = 1
    section: AnalysesSection
    data: DataSteps
    crosscoders: tuple[CrosscoderSteps, ...]
    run_settings: Mapping[str, Any]
    """The resolved run file, as the page prints it."""

    def reads(self) -> dict[str, Step[StageInputs]]:
        """All steps, under their names, in the order in which the run makes them."""
        steps: list[Step[StageInputs] | None] = [*self.data, *(own.crosscoder for own in self.crosscoders)]
        for own in self.crosscoders:
            steps += [own.latents, own.examples, own.planted, own.controls]
        steps += [own.causality for own in self.crosscoders]
        steps += [own.steering for own in self.crosscoders]
        steps += [own.autointerp for own in self.crosscoders]
        return {step.name: step for step in steps if step is not None}
