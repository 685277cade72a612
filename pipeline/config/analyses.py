"""What is asked of a fitted crosscoder. Each analysis has one section; null in the run file turns it off."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.config.section import Section


class FidelitySection(Section):
    """Fraction of variance explained, L0 and dead latents on the validation rows."""


class LatentScalingSection(Section):
    """How strongly each latent is present in either model, by least squares (arXiv 2504.02922, section 3)."""

    nu_eps_threshold: PositiveFloat = 0.2
    """Below it a chat-only latent is not explained by complete shrinkage."""
    nu_r_threshold: PositiveFloat = 0.5
    """Below it a chat-only latent is not explained by latent decoupling."""
    min_documents: PositiveInt = 10
    """A latent that fires in fewer validation documents is undecided: its ratios mean nothing."""
    num_groups: Annotated[int, Field(ge=20)] = 64
    """Groups of documents whose sums are kept apart for the bootstrap; memory grows as F x groups x 6 numbers."""
    num_resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples behind each 95% interval."""
    seed: NonNegativeInt = 0
    """Seed of the bootstrap."""


class ExamplesSection(Section):
    """The strongest contexts of latents, and some at given shares of their maximum."""

    num_contexts: PositiveInt = 8
    """Contexts per latent, each from another document."""
    window_tokens: PositiveInt = 16
    """Tokens shown on either side of the maximum."""
    num_sampled: NonNegativeInt = 4
    """Further contexts per latent near 0.95, 0.75, 0.5 and 0.25 of its maximum, so that weak firing shows too."""
    max_latents: PositiveInt = 200
    """Chat-only latents for which contexts are written, chat-specific ones first."""
    latents: Literal["all"] | tuple[NonNegativeInt, ...] = ()
    """Latents for which contexts are written whatever their verdict, besides those; `all` for every latent."""


class CausalitySection(Section):
    """How much of the KL divergence between the models a set of latents closes (arXiv 2504.02922, section 4)."""

    num_conversations: PositiveInt = 256
    """Validation dialogues used, taken in order of their hash."""
    num_random_halves: NonNegativeInt = 2
    """Random halves of the latent set as control."""
    max_latents: PositiveInt | None = None
    """Use only this many latents of highest Delta_norm; None takes the whole chat-only set."""
    min_latents: NonNegativeInt = 0
    """Where fewer latents are chat-only, fill the set with those of next highest Delta_norm; 0 never does."""
    num_random_orders: NonNegativeInt = 1
    """Random orders beside the order of evidence in which the curve adds latents, as control."""
    tokens_per_batch: PositiveInt = 4096
    """Tokens in one forward pass."""
    num_resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples over conversations."""
    seed: NonNegativeInt = 0
    """Seed of the random halves and orders and of the bootstrap."""

    @model_validator(mode="after")
    def _limits_agree(self) -> "CausalitySection":
        if self.max_latents is not None and self.min_latents > self.max_latents:
            raise ValueError(
                f"expected min_latents of at most max_latents, got {self.min_latents} and {self.max_latents}; "
                "lower the one or raise the other"
            )
        return self


class SteeringSection(Section):
    """What a latent does when its direction is added to a model's residual stream while it writes."""

    scales: tuple[float, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    """Multiples of the latent's maximal activation."""
    num_random: NonNegativeInt = 5
    """Random latents, scaled to equal norm, as control."""
    num_prompts: PositiveInt = 24
    """Neutral prompts per behaviour."""
    max_new_tokens: PositiveInt = 24
    """Length of an answer."""
    prompts_path: str | None = None
    """JSON file {behavior: {neutral: [...], markers: [...]}} or [prompt, ...]; None takes the organism's own. Without
    markers there is no rate, only KL, fluency and answers."""
    latents: tuple[NonNegativeInt, ...] = ()
    """Latents to steer with for every behaviour; empty takes num_latents."""
    num_latents: NonNegativeInt = 0
    """The most chat-specific latents to steer with for every behaviour; 0 takes each behaviour's best one (planted)."""
    models: tuple[Literal["chat", "base"], ...] = Field(("chat", "base"), min_length=1)
    """Models that answer. The base model with the latent added shows what the direction brings by itself."""
    positions: tuple[Literal["all", "prompt", "generated"], ...] = Field(("all",), min_length=1)
    """Where the direction is added; each is a sweep of its own."""
    temperature: NonNegativeFloat = 0.0
    """0 answers greedily; above, answers are sampled, every prompt with its own random numbers."""
    num_samples: NonNegativeInt = 3
    """Prompts per behaviour and scale whose answers are written out side by side."""
    seed: NonNegativeInt = 0
    """Seed of the random latents and of sampled answers."""


class AutointerpSection(Section):
    """Latents in words, by a language model behind an OpenAI-compatible endpoint, which resources.autointerp names.

    It reads passages of the corpus: they leave this machine unless the endpoint runs here.
    """

    model: Annotated[str, Field(min_length=1)]
    """Name under which the endpoint serves the model."""
    latents: tuple[NonNegativeInt, ...] = ()
    """Latents to explain; empty takes the chat-specific ones. Those that are not chat-only must also stand in
    analyses.examples.latents, since explanations are made from their contexts."""
    max_latents: PositiveInt = 100
    """At most this many chat-specific latents per crosscoder; requests and their cost grow with it."""
    num_explaining: PositiveInt = 6
    """Strongest contexts from which an explanation is written (at most half of those that a latent has)."""
    num_active: PositiveInt = 6
    """Held-out contexts on which the latent fires, spread over its range, among which the explanation is tested."""
    num_quiet: PositiveInt = 6
    """Contexts of other documents on which it does not fire, from the same corpora."""
    contexts_per_request: PositiveInt = 12
    """Contexts judged in one request; fewer cost more requests, more of them small models confuse."""
    with_control: bool = True
    """Also test another latent's explanation on each latent's contexts: what a sentence about something else scores.
    Costs as many requests again as the test itself."""
    temperature: NonNegativeFloat | None = 0.0
    """null leaves it out, as some models demand."""
    max_answer_tokens: PositiveInt | None = 400
    """Sent as max_tokens; null leaves it out."""
    request_fields: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Further fields of every request, such as reasoning_effort; never a key, everything here is recorded."""
    num_repeats: NonNegativeInt = 1
    """How often a request is made again after an answer that cannot be used, before it counts as unanswered."""
    seed: NonNegativeInt = 0
    """Seed of the choice and order of contexts."""


class PlantedSection(Section):
    """How well the latents find behaviours whose tokens are known (token-level AUROC on held-out dialogues)."""

    first_tokens: PositiveInt = 8
    """Tokens of each dialogue's answer over which the mean-difference baseline is taken (arXiv 2510.13900)."""
    num_resamples: Annotated[int, Field(ge=100)] = 200
    """Bootstrap resamples over documents."""
    seed: NonNegativeInt = 0
    """Seed of the bootstrap. Latents are chosen on one half of the documents and scored on the other, by hash."""


class ControlsSection(Section):
    """What the verdict says of its own errors, and what it says where the answer is known."""

    seed: NonNegativeInt = 0
    """Seed of the random directions."""
    min_match_cosine: float = Field(0.7, gt=0, le=1)
    """Latents of two training seeds match if they are each other's best and their cosine is at least this."""


class AnalysesSection(Section):
    """The analyses of every crosscoder of the run."""

    fidelity: FidelitySection = FidelitySection()
    """Always on: no verdict without it."""
    latent_scaling: LatentScalingSection = LatentScalingSection()
    """Always on: the verdict rests on it."""
    examples: ExamplesSection | None = ExamplesSection()
    """null turns it off."""
    controls: ControlsSection | None = ControlsSection()
    """null turns it off. Crosscoders of the run that differ in nothing but seed and name are matched too."""
    causality: CausalitySection | None = CausalitySection()
    """null turns it off."""
    steering: SteeringSection | None = None
    """null (the default) turns it off; it needs an organism or prompts_path."""
    planted: PlantedSection | None = None
    """null (the default) turns it off; it needs labels in the corpus."""
    autointerp: AutointerpSection | None = None
    """null (the default) turns it off; it needs examples and an endpoint."""
