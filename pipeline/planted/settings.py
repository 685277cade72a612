"""The benchmark's file (workloads/planted.yaml): worlds, recipes, thresholds of the verdict, and where it runs.

It is as strict as a run file and has the same errors; recipes are the `crosscoders` of a run file. Worlds and trials
are identified by what they are made from: not by `cluster`, `workers`, `storage` or a name, and not by `min_cosine`,
which only the table depends on.
"""

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.config.analyses import LatentScalingSection
from pipeline.config.crosscoder import CrosscoderSection, TrainingSection
from pipeline.config.resources import ClusterSection, StorageSection, WorkersSection
from pipeline.config.section import Fraction, Name, Section
from pipeline.planted.world import WorldSpec

Span = tuple[Fraction, Fraction]


class ConceptCounts(Section):
    """How many concepts of each kind a world has."""

    shared: PositiveInt
    """In both models alike."""
    half_present: NonNegativeInt
    """In the base model at reduced strength."""
    rotated: NonNegativeInt
    """In both, along different directions."""
    loose: NonNegativeInt
    """In both, with independent strengths, sometimes in one alone."""
    chat_only: NonNegativeInt
    """In the chat model alone: what a verdict should find. With 0 every call is false."""
    base_only: NonNegativeInt
    """In the base model alone."""


class WorldSection(Section):
    """Activations with known concepts. A concept's strength is about 1; noise and offset are in the same unit."""

    activation_dim: PositiveInt
    """Width D."""
    concepts: ConceptCounts
    """Their number by kind."""
    frequency_max: Fraction
    """Share of rows with the most frequent concept; frequencies follow a power law of the rank."""
    frequency_min: Fraction
    """Share of rows with the rarest one."""
    document_rows: PositiveInt = 32
    """Rows of a document."""
    topic_rate: Fraction = 0.2
    """Frequency of a concept within a document that is about it; in all other documents it never occurs."""
    strength_spread: NonNegativeFloat = 0.25
    """Standard deviation of the log strength from concept to concept."""
    row_spread: NonNegativeFloat = 0.3
    """The same from row to row."""
    base_strength: Span = (0.25, 0.8)
    """Half-present concepts: range of the base model's strength. Below 0.2 the verdict's own thresholds call a concept
    chat-specific, so there is no truth to score."""
    base_cosine: Span = (0.5, 0.95)
    """Rotated concepts: range of the cosine between the models' directions."""
    loose_agreement: Fraction = 0.7
    """Loose concepts: share of their rows on which both models have them."""
    attached_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the chat-only concepts that occur only where a shared concept does."""
    attached_rate: Fraction = 0.35
    """On at most this share of that concept's rows; above a half a dictionary rightly merges the two."""
    common_noise: NonNegativeFloat = 0.05
    """Standard deviation per dimension of noise that both models share."""
    own_noise: NonNegativeFloat = 0.05
    """The same of each model's own noise."""
    offset_norm: NonNegativeFloat = 0.3
    """Norm of the constant that each model adds. Larger ones leave most latents dead in a run of minutes."""
    scale_ratio: PositiveFloat = 1.0
    """The chat model's rows, noise and offset included, are multiplied by this. It changes no concept's truth."""

    def spec(self) -> WorldSpec:
        """The numbers that make the world."""
        values = self.model_dump(exclude={"concepts"})
        counts = {name.replace("_", "-"): count for name, count in self.concepts.model_dump().items()}
        return WorldSpec(concepts=counts, **values)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("base_strength", "base_cosine"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"world.{name}: expected [low, high], got [{low}, {high}]")
        if self.frequency_min > self.frequency_max:
            raise ValueError(
                f"world.frequency_min: expected at most frequency_max = {self.frequency_max}, got {self.frequency_min}"
            )
        return self


class RowsSection(Section):
    """How many rows of a world are written."""

    train: PositiveInt = 192_000
    """Rows to fit on, rounded down to whole documents."""
    validation: PositiveInt = 64_000
    """Rows to judge on."""
    per_shard: PositiveInt = 32_000
    """Rows of one file."""


class CheckpointSection(Section):
    """A crosscoder from elsewhere that was fitted on the activations of one world."""

    name: Name
    """Name in the table; one name may occur once per seed."""
    source: Annotated[str, Field(min_length=1)]
    """Folder, file or hub id, in any layout that crossray reads."""
    seed: NonNegativeInt = 0
    """Of the world."""


class BenchmarkConfig(Section):
    """One benchmark: every recipe on every seed's world."""

    name: Name
    """Name of the benchmark and of its folder of results."""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """One world and one initialisation per seed; intervals need at least two."""
    world: WorldSection
    """The activations and their concepts."""
    rows: RowsSection = RowsSection()
    """How many rows of it are written."""
    training: TrainingSection
    """The read of the activations, the same for every recipe."""
    recipes: tuple[CrosscoderSection, ...] = Field(min_length=1)
    """The crosscoders to fit, as in a run file; their seed is added to the world's. With `seeds` above 1 the verdict is
    scored a second time, for the latents that at least half of the other seeds find again."""
    judge: LatentScalingSection = LatentScalingSection()
    """Thresholds of the verdict."""
    min_cosine: PositiveFloat = 0.7
    """A latent finds a concept if its chat decoder and the concept's chat direction have at least this cosine."""
    checkpoints: tuple[CheckpointSection, ...] = ()
    """Foreign crosscoders, judged beside the recipes."""
    cluster: ClusterSection = ClusterSection()
    """The Ray cluster."""
    workers: WorkersSection = WorkersSection()
    """Processes that make worlds, fit and judge."""
    storage: StorageSection = StorageSection()
    """Where activations, crosscoders and results are kept."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, names in (
            ("seeds", list(self.seeds)),
            ("recipes", [recipe.name for recipe in self.recipes]),
            ("checkpoints", [(one.name, one.seed) for one in self.checkpoints]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: expected distinct ones, got {names}")
        warm = [recipe.name for recipe in self.recipes if recipe.init_from is not None]
        if warm:
            raise ValueError(
                f"recipes: expected random initial weights, which each seed draws, got init_from in {warm}"
            )
        taken = {recipe.name for recipe in self.recipes} & {one.name for one in self.checkpoints}
        if taken:
            raise ValueError(f"checkpoints: expected names that no recipe has, got {sorted(taken)}")
        foreign = sorted({one.seed for one in self.checkpoints} - set(self.seeds))
        if foreign:
            raise ValueError(f"checkpoints: expected seeds of {list(self.seeds)}, got {foreign}")
        return self
