"""The analyses of a fitted crosscoder: one section each. `null` in the run file turns an optional one off.

These settings enter the identity of the analysis that they belong to, and of nothing else: a change repeats that
analysis and the report. What each analysis computes is written in docs/method.md.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.config.section import Section


class FidelitySection(Section):
    """Fraction of variance explained, L0 and dead latents, measured on the validation rows."""


class QualitySection(Section):
    """What a crosscoder needs for a verdict. Below it the report says what is missing in place of an answer."""

    min_fve: float = Field(0.5, ge=0, le=1)
    """Fraction of variance explained in each model, attention sinks aside. 0 asks for nothing."""
    max_dead_frac: float = Field(0.95, ge=0, le=1)
    """Share of latents that never fire on the validation rows."""
    min_rows_per_latent: NonNegativeFloat = 50.0
    """Training rows divided by latents."""
    min_documents: NonNegativeInt = 50
    """Validation documents."""


class EvidenceSection(Section):
    """How different the two models are at all: their next tokens and their streams, on held-out documents."""

    num_documents: PositiveInt = 128
    """Validation dialogues, and as many plain documents, that both models read. More narrow the intervals and take
    proportionally longer."""
    max_positions: PositiveInt = 256
    """Predicted tokens compared in each document, drawn at random. More take longer where the vocabulary is large."""
    tokens_per_batch: PositiveInt = 4096
    """Tokens in one forward pass, padding included. Raising it needs more memory."""


class LayersSection(Section):
    """At which layer the difference between the models happens (`crossray layers`, activations.layer: auto)."""

    num_documents: PositiveInt = 200
    """Validation dialogues, and as many plain documents, that both models read. More narrow the intervals and take
    proportionally longer."""
    max_positions: PositiveInt = 64
    """Predicted tokens compared in each document, drawn at random, once per layer."""
    max_layers: PositiveInt | None = None
    """Layers to measure, evenly spaced. null measures all."""
    min_share: float = Field(0.5, gt=0, le=1)
    """The earliest layer that carries this share of the difference in behaviour is named."""
    tokens_per_batch: PositiveInt = 2048
    """Tokens in one forward pass, padding included. The streams of all layers of both models are held for them."""


class LatentScalingSection(Section):
    """Latent Scaling: how strongly each latent is present in each model (arXiv 2504.02922, section 3)."""

    rule: Literal["evidence", "paper"] = "evidence"
    """What draws the verdict. `evidence` judges every live latent by the rows, with the false discovery rate below.
    `paper` judges chat-only latents by the ratios themselves, as arXiv 2504.02922 does."""
    false_discovery_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Expected share of false ones among the latents called chat-specific by `evidence`, at most (Benjamini-Hochberg).
    Raising it calls more. Under `paper` it decides which calls are confident."""
    nu_eps_threshold: PositiveFloat = 0.2
    """The base model holds a latent whose nu_eps is at least this, in size. Raising it calls more chat-specific."""
    nu_r_threshold: PositiveFloat = 0.5
    """Other latents carry it in the base model from this nu_r on, in size. Raising it calls more chat-specific."""
    min_documents: PositiveInt = 10
    """A latent that fires in fewer validation documents is undecided. Raising it leaves more latents undecided."""
    num_groups: Annotated[int, Field(ge=20, le=100_000)] = 64
    """Groups of documents that the bootstrap resamples. More give finer intervals and take F x groups x 6 numbers."""
    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 1000
    """Bootstrap resamples behind each 95% interval. More give steadier ends and take proportionally longer."""
    seed: NonNegativeInt = 0
    """Seed of the bootstrap."""
    training_rows: NonNegativeInt = 0
    """Estimate both ratios of chat-only latents once more on at least this many stored training rows, to compare. The
    paper's are from training rows. 0 reads none; others are read as the validation rows are."""
    activation_share: Annotated[float, Field(ge=0, lt=1)] = 0
    """Estimate them once more on the validation rows where a latent is above this share of its maximum. Above 0 it
    takes another pass over these rows."""


class ExamplesSection(Section):
    """Text around the places where a latent fires: its strongest contexts, and weaker ones for comparison."""

    num_contexts: PositiveInt = 8
    """Strongest contexts per latent, each from a different document."""
    window_tokens: PositiveInt = 16
    """Tokens shown before and after the token where the latent fires most."""
    num_sampled: NonNegativeInt = 4
    """Further contexts per latent, near 0.95, 0.75, 0.5 and 0.25 of its maximum, to show weak firing."""
    max_latents: PositiveInt = 200
    """At most this many chat-only latents get contexts, chat-specific ones first."""
    latents: Literal["all"] | tuple[NonNegativeInt, ...] = ()
    """Further latents that get contexts, whatever their verdict. `all` takes every latent of the dictionary."""


class LogitLensSection(Section):
    """Tokens that a latent's directions promote and suppress, and the mean difference of the first tokens' rows."""

    num_tokens: PositiveInt = 10
    """Tokens named on each side."""
    max_latents: PositiveInt = 200
    """At most this many latents that are not shared, chat-specific ones first."""
    latents: Literal["all"] | tuple[NonNegativeInt, ...] = ()
    """Further latents, whatever their verdict. `all` takes every latent of the dictionary."""
    first_tokens: PositiveInt = 5
    """Leading positions of documents whose mean difference is read (arXiv 2510.13900)."""


class CausalitySection(Section):
    """How much of the KL divergence between the models a set of latents removes (arXiv 2504.02922, section 4)."""

    num_conversations: PositiveInt = 256
    """Validation dialogues to measure, in the order of their hash. More narrow the intervals and take longer."""
    num_random_halves: int = Field(2, ge=0, le=1000)
    """Random halves of the latent set, as a control beside the best and the worst half."""
    max_latents: PositiveInt | None = None
    """Use only this many latents, those of highest Delta_norm. null uses the whole chat-only set."""
    set_size: Literal["own_class", "larger_class"] = "own_class"
    """own_class: each crosscoder's own chat-only set. larger_class: as many latents for each crosscoder as the largest
    chat-only class among the run's crosscoders has, those of highest Delta_norm; the paper compares L1 with BatchTopK
    so. max_latents still limits it."""
    min_latents: NonNegativeInt = 0
    """Fill a chat-only set that is smaller than this with the latents of next highest Delta_norm. 0 never fills."""
    num_random_orders: int = Field(1, ge=0, le=1000)
    """Random orders in which the curve adds latents, as a control beside the order of evidence."""
    num_first: NonNegativeInt = 5
    """Baseline: the chat model's stream at the positions that predict the first this many tokens of each answer, alone
    and together with the template's tokens. 0 leaves both out."""
    num_principal: NonNegativeInt = 4
    """Baseline: projections of the difference between the streams on its first principal direction and on the first
    this many. 0 leaves both out."""
    further_sets: tuple[Literal["thresholds", "base_only"], ...] = ()
    """Further sets of latents, each of which takes one upper half. thresholds: all latents below or above limits of
    nu_act and Delta_norm, as in the paper's code, and the chat-only ones within and beyond the verdict's thresholds.
    base_only: the base-only latents together with each half and alone, so that they are taken off the base stream."""
    num_equivalence_latents: NonNegativeInt = 16
    """Causal equivalence of this many chat-specific latents and as many shared ones: whether adding d^base does to the
    chat model's next tokens what adding d^chat does. Each takes two forward passes over a few dialogues. 0 turns it
    off."""
    tokens_per_batch: PositiveInt = 4096
    """Tokens in one forward pass, padding included. Raising it needs more memory."""
    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 1000
    """Bootstrap resamples of conversations behind each interval."""
    seed: NonNegativeInt = 0
    """Seed of the random halves, the random orders and the bootstrap."""

    @model_validator(mode="after")
    def _limits_agree(self) -> "CausalitySection":
        if self.max_latents is not None and self.min_latents > self.max_latents:
            raise ValueError(
                f"expected min_latents of at most max_latents, got {self.min_latents} and {self.max_latents}; "
                "lower the one or raise the other"
            )
        return self


class SteeringSection(Section):
    """Answers of a model while the direction of a latent is added to its residual stream."""

    scales: tuple[float, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    """Strength of the added direction, as multiples of the latent's largest contribution. Each is one sweep."""
    num_random: int = Field(5, ge=0, le=100_000)
    """Random latents, scaled to the same norm, as a control."""
    num_prompts: PositiveInt = 24
    """Neutral prompts per behaviour. More make the rates finer and take proportionally longer."""
    max_new_tokens: PositiveInt = 24
    """Longest answer, in tokens."""
    prompts_path: str | None = None
    """JSON file: {behavior: {neutral: [...], markers: [...]}} or [prompt, ...]. null takes the organism's own prompts.
    Without markers there are no rates, only KL, fluency and answers."""
    latents: tuple[NonNegativeInt, ...] = ()
    """Latents to steer with, for every behaviour. Empty uses num_latents."""
    num_latents: NonNegativeInt = 0
    """Steer with this many of the most chat-specific latents. 0 takes the best latent of each planted behaviour: a
    chat-specific one, or the best of any verdict where none is."""
    models: tuple[Literal["chat", "base"], ...] = Field(("chat", "base"), min_length=1)
    """Models that answer. A steered base model shows what the direction does without the fine-tuned weights."""
    positions: tuple[Literal["all", "prompt", "generated"], ...] = Field(("all",), min_length=1)
    """Tokens at which the direction is added. Each entry is a separate sweep."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the answers. 0 is greedy decoding; above, each prompt has its own random stream."""
    num_samples: NonNegativeInt = 3
    """Prompts per behaviour and scale whose answers are kept, steered beside unsteered."""
    seed: NonNegativeInt = 0
    """Seed of the random latents and of the sampled answers."""


class AutointerpSection(Section):
    """Explanations of latents in words, from a language model behind an OpenAI-compatible endpoint.

    resources.autointerp names the endpoint. Passages of the corpus are sent to it.
    """

    model: Annotated[str, Field(min_length=1)]
    """Name of the model at the endpoint."""
    latents: tuple[NonNegativeInt, ...] = ()
    """Latents to explain. Empty takes the chat-specific ones. List others in analyses.examples.latents too, because
    explanations are made from contexts."""
    max_latents: PositiveInt = 100
    """At most this many chat-specific latents per crosscoder. Requests and cost grow in proportion."""
    num_explaining: PositiveInt = 6
    """Strongest contexts that the model reads to write an explanation, at most half of what the latent has."""
    num_active: PositiveInt = 6
    """Held-out contexts on which the latent fires, spread over its range, used to test the explanation."""
    num_quiet: PositiveInt = 6
    """Contexts of other documents on which the latent does not fire, from the same corpora, used in the same test."""
    contexts_per_request: PositiveInt = 12
    """Contexts judged in one request. More cost fewer requests, but small models then make more mistakes."""
    with_control: bool = True
    """Also score another latent's explanation on each latent's contexts, as a baseline. This doubles the requests of
    the test."""
    temperature: NonNegativeFloat | None = 0.0
    """Sampling temperature of the requests. null omits the field, which some models require."""
    max_answer_tokens: PositiveInt | None = 400
    """Longest answer in tokens, sent as max_tokens. null omits the field."""
    request_fields: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Further fields of every request, such as reasoning_effort. They are recorded, so put no key here."""
    num_repeats: NonNegativeInt = 1
    """How often to ask again after an answer that cannot be parsed. After that the question counts as unanswered."""
    seed: NonNegativeInt = 0
    """Seed of the choice and the order of contexts."""


class PlantedSection(Section):
    """How well latents find tokens with a known label: AUROC per token on held-out dialogues."""

    first_tokens: PositiveInt = 8
    """First tokens of each answer over which the mean-difference baseline is taken (arXiv 2510.13900)."""
    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 200
    """Bootstrap resamples of documents behind each interval."""
    seed: NonNegativeInt = 0
    """Seed of the bootstrap. Latents are chosen on half of the documents, by hash, and scored on the other half."""


class ControlsSection(Section):
    """Controls of the verdict: its stated error rate, and its answer in cases where the truth is known."""

    seed: NonNegativeInt = 0
    """Seed of the random directions."""
    min_match_cosine: float = Field(0.7, gt=0, le=1)
    """Latents of two training seeds match if each is the other's nearest and their cosine is at least this. Raising it
    lowers the agreement between seeds."""


class AnalysesSection(Section):
    """The analyses that every crosscoder of the run goes through."""

    evidence: EvidenceSection | None = EvidenceSection()
    """null skips the comparison of the models; then no call is withheld where they cannot be told apart."""
    layers: LayersSection = LayersSection()
    """Used by `crossray layers` and activations.layer: auto alone."""
    fidelity: FidelitySection = FidelitySection()
    """Always on."""
    quality: QualitySection | None = QualitySection()
    """null gives an answer whatever the crosscoder's quality."""
    latent_scaling: LatentScalingSection = LatentScalingSection()
    """Always on, because the verdict depends on it."""
    examples: ExamplesSection | None = ExamplesSection()
    """null writes no contexts."""
    controls: ControlsSection | None = ControlsSection()
    """null turns the controls off. Crosscoders of the run that differ only in seed and name are compared as well."""
    logit_lens: LogitLensSection | None = LogitLensSection()
    """null names no tokens."""
    causality: CausalitySection | None = CausalitySection()
    """null turns it off. Needs dialogues in the corpus."""
    steering: SteeringSection | None = None
    """Off by default. Needs an organism or prompts_path."""
    planted: PlantedSection | None = None
    """Off by default. Needs token labels in the corpus, which only an organism has."""
    autointerp: AutointerpSection | None = None
    """Off by default. Needs analyses.examples and an endpoint."""
