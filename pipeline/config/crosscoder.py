"""The crosscoders of a run: fitted on one shared read of the activations, or adopted from elsewhere."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag, model_validator

from pipeline.config.section import Name, Section
from pipeline.numerics.rules import check_active_latents, check_recipe


class L1Sparsity(Section):
    """ReLU codes with a penalty; kept as the field's reference, known to invent chat-only latents."""

    kind: Literal["l1"]
    mu: float = Field(4.1e-2, ge=0)
    """Weight of the penalty; raising it lowers L0."""
    mu_warmup_steps: NonNegativeInt = 0
    """The penalty grows linearly from 0 over this many steps."""


class _AuxiliarySparsity(Section):
    k: PositiveInt = 100
    """Mean active latents per row."""
    aux_weight: float = Field(1 / 32, ge=0)
    """Weight of the auxiliary loss that revives dead latents; 0 turns it off."""
    aux_k: PositiveInt | None = None
    """Dead latents used per row by the auxiliary loss; None means half the activation width."""
    dead_after_rows: PositiveInt = 10_000_000
    """A latent that has not fired for this many rows counts as dead."""


class BatchTopKSparsity(_AuxiliarySparsity):
    """The k * batch_rows largest weighted codes of the whole global batch."""

    kind: Literal["batch_topk"]
    k_start: PositiveInt | None = None
    """Begin with this k and go down linearly; None starts at k."""
    k_anneal_steps: NonNegativeInt = 0
    """Steps from k_start to k; 0 means k from the first step."""
    threshold_decay: float = Field(0.999, ge=0, lt=1)
    """Decay per step of the inference threshold's moving average."""
    threshold_start_step: NonNegativeInt = 1000
    """First step that enters the threshold's moving average."""


class TopKSparsity(_AuxiliarySparsity):
    """The k largest weighted codes of each row."""

    kind: Literal["topk"]


class JumpReluSparsity(Section):
    """Codes above a learned threshold per latent."""

    kind: Literal["jumprelu"]
    mu: float = Field(1e-3, ge=0)
    """Weight of the mean number of active latents; raising it lowers L0."""
    bandwidth: PositiveFloat = 1e-2
    """Width of the straight-through estimator around the threshold."""
    initial_threshold: PositiveFloat = 1e-2
    """Threshold of every latent at the start."""


Sparsity = Annotated[L1Sparsity | BatchTopKSparsity | TopKSparsity | JumpReluSparsity, Field(discriminator="kind")]


class CrosscoderSection(Section):
    """One dictionary to fit; all crosscoders of a run are fitted from one read of the activations."""

    kind: Literal["fitted"] = "fitted"
    name: Name
    """Name in tables, figures and MLflow."""
    sparsity: Sparsity
    """What keeps the codes sparse."""
    num_latents: PositiveInt | None = None
    """Size F of the dictionary; give this or expansion."""
    expansion: PositiveInt | None = None
    """F as a multiple of the activation width (32 in the paper)."""
    inputs: Literal["both", "difference"] = "both"
    """Fit the dictionary on both models' activations, or on chat - base (a difference SAE). A difference is published
    as a crosscoder of both models; its Delta_norm is 1 by construction and its FVE is that of the difference."""
    dedicated_frac: float = Field(0.0, ge=0, le=0.5)
    """Share of the latents that only the chat model has, and as many that only the base model has; their Delta_norm is
    1 or 0 by construction. The verdict then rests on Latent Scaling's activation target."""
    code_weight: Literal["crosscoder", "sae", "mixed", "none", "decoupled"] = "crosscoder"
    """What a latent costs: sum of its decoder norms, norm of both together, a mix, 1, or per model."""
    reconstruction: Literal["l2", "mse"] = "l2"
    """Mean unsquared L2 norm of the error, or the squared one."""
    init_norm: PositiveFloat = 1.0
    """Decoder norm per latent and model at the start (0.005 for L1 in the paper)."""
    lr: PositiveFloat = 1e-4
    """Adam's learning rate after warm-up."""
    lr_warmup_steps: NonNegativeInt = 1000
    """Linear warm-up; a run shorter than this reaches only part of lr."""
    lr_decay_frac: float = Field(0.0, ge=0, le=1)
    """Share of the run's end over which lr falls linearly to 0; 0 keeps it constant."""
    clip_norm: PositiveFloat | None = 1.0
    """Global gradient norm limit; None does not clip."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.num_latents is None) == (self.expansion is None):
            raise ValueError(
                f"crosscoder {self.name!r}: expected exactly one of num_latents and expansion, "
                f"got num_latents={self.num_latents} and expansion={self.expansion}"
            )
        return self

    @model_validator(mode="after")
    def _can_be_fitted(self) -> Self:
        try:
            check_recipe(inputs=self.inputs, dedicated_frac=self.dedicated_frac, code_weight=self.code_weight)
            for name in ("k", "k_start"):
                value = getattr(self.sparsity, name, None)
                if self.num_latents is not None and value is not None:
                    check_active_latents(name, value, num_latents=self.num_latents, kind=self.sparsity.kind)
        except ValueError as error:
            raise ValueError(f"crosscoder {self.name!r}: {error}") from error
        return self


class AdoptedCrosscoderSection(Section):
    """Someone else's crosscoder of this pair and layer: it enters at the analyses, nothing is fitted."""

    kind: Literal["adopted"]
    name: Name
    """Name in tables, figures and MLflow."""
    source: str
    """Hub id (owner/name or owner/name/folder), local folder or weights file, in one of the published layouts."""
    revision: str | None = None
    """Commit or tag of a hub id; pin it, or the hub may change the result under an unchanged name."""
    activation_scale: tuple[PositiveFloat, PositiveFloat] | None = None
    """Factors of base and chat activations, for the layout cfg.json + cc_weights.pt, which does not hold them. None
    measures sqrt(activation_dim) / mean |x| on this run's rows, which is what such crosscoders were trained on."""


def _crosscoder_kind(value: Any) -> str:
    """An entry without `kind` is fitted: that is what nearly everyone writes."""
    return str(value.get("kind", "fitted") if isinstance(value, dict) else getattr(value, "kind", "fitted"))


CrosscoderEntry = Annotated[
    Annotated[CrosscoderSection, Tag("fitted")] | Annotated[AdoptedCrosscoderSection, Tag("adopted")],
    Discriminator(_crosscoder_kind),
]


class TrainingSection(Section):
    """The read of the activations that all crosscoders of the run share."""

    batch_rows: PositiveInt = 2048
    """Rows per optimiser step over all workers together."""
    num_rows: PositiveInt = 200_000_000
    """Rows to train on; more than the store holds means several epochs."""
    shuffle_seed: NonNegativeInt = 0
    """Seed of the row order."""
    shuffle_buffer_rows: PositiveInt = 200_000
    """activations.mode stream only: rows from which batches are drawn, over all data ranks; more mix better and cost
    memory, rows x 2 models x width x 2 bytes."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of the matrix products over float32 weights; the last two need a GPU."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps: as many whole batches as num_rows holds."""
        return self.num_rows // self.batch_rows
