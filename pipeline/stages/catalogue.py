"""Every stage in the order of the flow: its name, its VERSION and all that it needs to make one artifact.

run/flow.py fills these classes from the run file; each stage's file reads them and nothing else. READS names the
attributes whose artifacts a stage reads; these names are the roles under which the artifacts' fingerprints enter the
identity of what is made. The classes are not in the stage files because those import torch, Ray and pandas, which take
seconds to load and are not needed to see that a run is finished.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.config.analyses import (
    AnalysesSection,
    AutointerpSection,
    CausalitySection,
    ControlsSection,
    EvidenceSection,
    ExamplesSection,
    LatentScalingSection,
    LayersSection,
    LogitLensSection,
    PlantedSection,
    SteeringSection,
)
from pipeline.config.crosscoder import AdoptedCrosscoderSection, CrosscoderSection, TrainingSection
from pipeline.config.data import ActivationsSection, CorpusSection, OrganismSection, TokensSection
from pipeline.stages.locations import Loading, ModelPairLocation
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
    VERSION = 4
    READS = ("organism",)
    section: CorpusSection
    organism: Step[OrganismInputs] | None
    """Where a source is the organism's."""


@dataclass(frozen=True, kw_only=True)
class TokensInputs(StageInputs):
    """Token ids that both models read."""

    NAME = "tokens"
    VERSION = 4
    READS = ("organism", "corpus")
    section: TokensSection
    organism: Step[OrganismInputs] | None
    corpus: Step[CorpusInputs]
    models: ModelPairLocation
    weights: Mapping[str, float]
    """Share of the token budget by corpus, not normalised."""


@dataclass(frozen=True, kw_only=True)
class LayersInputs(StageInputs):
    """The curve over layers, from which the layer is chosen."""

    NAME = "layers"
    VERSION = 1
    READS = ("organism", "tokens")
    section: LayersSection
    rows: ActivationsSection
    """Which tokens count as rows; its layer is not read."""
    organism: Step[OrganismInputs] | None
    tokens: Step[TokensInputs]
    loading: Loading


@dataclass(frozen=True, kw_only=True)
class ActivationsInputs(StageInputs):
    """Residual-stream rows of both models after layer L."""

    NAME = "activations"
    VERSION = 4
    READS = ("organism", "tokens")
    section: ActivationsSection
    organism: Step[OrganismInputs] | None
    tokens: Step[TokensInputs]
    loading: Loading


@dataclass(frozen=True, kw_only=True)
class EvidenceInputs(StageInputs):
    """Whether the two models can be told apart, before any crosscoder is fitted."""

    NAME = "evidence"
    VERSION = 1
    READS = ("organism", "tokens", "activations")
    section: EvidenceSection
    activations: Step[ActivationsInputs]
    loading: Loading

    @property
    def tokens(self) -> Step[TokensInputs]:
        """The documents that both models read."""
        return self.activations.inputs.tokens

    @property
    def organism(self) -> Step[OrganismInputs] | None:
        """The generated pair, if the run has one."""
        return self.activations.inputs.organism


@dataclass(frozen=True, kw_only=True)
class FittedCrosscoderInputs(StageInputs):
    """A crosscoder that the run fits."""

    NAME = "crosscoder"
    VERSION = 2
    READS = ("activations",)
    section: CrosscoderSection
    activations: Step[ActivationsInputs]
    training: TrainingSection


@dataclass(frozen=True, kw_only=True)
class AdoptedCrosscoderInputs(StageInputs):
    """A crosscoder from elsewhere."""

    NAME = "crosscoder"
    VERSION = 1
    READS = ("activations",)
    section: AdoptedCrosscoderSection
    activations: Step[ActivationsInputs]


CrosscoderStep = Step[FittedCrosscoderInputs] | Step[AdoptedCrosscoderInputs]


@dataclass(frozen=True, kw_only=True)
class LatentsInputs(StageInputs):
    """The latent table: Latent Scaling, ownership and verdict."""

    NAME = "latents"
    VERSION = 8
    READS = ("crosscoder", "activations", "evidence")
    section: LatentScalingSection
    crosscoder: CrosscoderStep
    evidence: Step[EvidenceInputs] | None
    """Where it finds no difference between the models, chat-specific calls are withheld."""

    @property
    def activations(self) -> Step[ActivationsInputs]:
        """The rows that the crosscoder reads."""
        return self.crosscoder.inputs.activations


_ANALYSIS_READS: tuple[str, ...] = ("crosscoder", "activations", "latents")


@dataclass(frozen=True, kw_only=True)
class AnalysisInputs(StageInputs):
    """What every analysis of one crosscoder needs: its latent table, and through it all that came before."""

    READS = _ANALYSIS_READS
    latents: Step[LatentsInputs]

    @property
    def crosscoder(self) -> CrosscoderStep:
        """The crosscoder."""
        return self.latents.inputs.crosscoder

    @property
    def activations(self) -> Step[ActivationsInputs]:
        """The rows that it reads."""
        return self.latents.inputs.activations

    @property
    def tokens(self) -> Step[TokensInputs]:
        """The documents of the rows."""
        return self.activations.inputs.tokens

    @property
    def organism(self) -> Step[OrganismInputs] | None:
        """The generated pair, if the run has one."""
        return self.activations.inputs.organism


@dataclass(frozen=True, kw_only=True)
class ExamplesInputs(AnalysisInputs):
    """Contexts in which latents fire."""

    NAME = "examples"
    VERSION = 5
    READS = (*_ANALYSIS_READS, "tokens")
    section: ExamplesSection


@dataclass(frozen=True, kw_only=True)
class PlantedInputs(AnalysisInputs):
    """Latents scored by planted labels."""

    NAME = "planted"
    VERSION = 6
    READS = (*_ANALYSIS_READS, "tokens")
    section: PlantedSection


@dataclass(frozen=True, kw_only=True)
class ControlsInputs(AnalysisInputs):
    """Controls of a crosscoder's verdict."""

    NAME = "controls"
    VERSION = 6
    section: ControlsSection
    other_seeds: tuple[Step[LatentsInputs], ...]
    """Latent tables of the run's crosscoders that differ from this one in their seed alone."""
    injected: Step[LatentsInputs] | None
    """Latent table of the same crosscoder fitted on rows with planted concepts; None where its power is not asked."""
    noise: float | None
    """The weight noise that alone tells the two models apart, 0 for equal models; None where they differ otherwise."""

    def reads(self) -> dict[str, Step[StageInputs]]:
        """The other fits too, under their names."""
        roles = super().reads()
        for other in (*self.other_seeds, *([] if self.injected is None else [self.injected])):
            roles |= {other.inputs.crosscoder.name: other.inputs.crosscoder, other.name: other}
        return roles


@dataclass(frozen=True, kw_only=True)
class LogitLensInputs(AnalysisInputs):
    """Promoted and suppressed tokens."""

    NAME = "logit_lens"
    VERSION = 1
    READS = (*_ANALYSIS_READS, "organism")
    section: LogitLensSection
    loading: Loading


@dataclass(frozen=True, kw_only=True)
class CausalityInputs(AnalysisInputs):
    """KL of interventions."""

    NAME = "causality"
    VERSION = 5
    READS = (*_ANALYSIS_READS, "tokens", "organism")
    section: CausalitySection
    loading: Loading
    compared: tuple[Step[LatentsInputs], ...] = ()
    """Latent tables of the run's other crosscoders, where all are compared on sets of one size."""

    def reads(self) -> dict[str, Step[StageInputs]]:
        """The tables of the others too, under their names."""
        return super().reads() | {other.name: other for other in self.compared}


@dataclass(frozen=True, kw_only=True)
class SteeringInputs(AnalysisInputs):
    """Answers under steering."""

    NAME = "steering"
    VERSION = 5
    READS = (*_ANALYSIS_READS, "tokens", "organism", "planted")
    section: SteeringSection
    planted: Step[PlantedInputs] | None
    loading: Loading


@dataclass(frozen=True, kw_only=True)
class AutointerpInputs(AnalysisInputs):
    """Explanations of latents by a language model."""

    NAME = "autointerp"
    VERSION = 2
    READS = (*_ANALYSIS_READS, "examples")
    section: AutointerpSection
    examples: Step[ExamplesInputs]


class DataSteps(NamedTuple):
    """What all crosscoders share."""

    organism: Step[OrganismInputs] | None
    corpus: Step[CorpusInputs]
    tokens: Step[TokensInputs]
    activations: Step[ActivationsInputs]
    evidence: Step[EvidenceInputs] | None = None
    """None where the run file turns it off."""


class CrosscoderSteps(NamedTuple):
    """A crosscoder and its analyses; None where the run file turns one off."""

    crosscoder: CrosscoderStep
    latents: Step[LatentsInputs]
    examples: Step[ExamplesInputs] | None
    planted: Step[PlantedInputs] | None
    controls: Step[ControlsInputs] | None
    logit_lens: Step[LogitLensInputs] | None
    causality: Step[CausalityInputs] | None
    steering: Step[SteeringInputs] | None
    autointerp: Step[AutointerpInputs] | None


@dataclass(frozen=True, kw_only=True)
class ReportInputs(StageInputs):
    """The page and the verdict table; they read every artifact of the run."""

    NAME = "report"
    VERSION = 4
    section: AnalysesSection
    data: DataSteps
    crosscoders: tuple[CrosscoderSteps, ...]
    layers: Step[LayersInputs]
    """The curve over layers; read where somebody has measured it, and no part of the identity."""
    run_settings: Mapping[str, Any]
    """The resolved run file, as the page prints it."""

    def reads(self) -> dict[str, Step[StageInputs]]:
        """All steps, under their names, in the order in which the run makes them."""
        steps: list[Step[StageInputs] | None] = [*self.data, *(own.crosscoder for own in self.crosscoders)]
        for own in self.crosscoders:
            steps += [own.latents, own.examples, own.planted, own.controls]
        steps += [own.logit_lens for own in self.crosscoders]
        steps += [own.causality for own in self.crosscoders]
        steps += [own.steering for own in self.crosscoders]
        steps += [own.autointerp for own in self.crosscoders]
        return {step.name: step for step in steps if step is not None}
