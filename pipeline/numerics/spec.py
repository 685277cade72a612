"""Everything that defines the training of one crosscoder, as plain checked numbers.

FitSettings are the hyper-parameters beside the sparsity's own (sparsities/): a run file's crosscoder section is built
from both. CrosscoderSpec adds the size of the activations and how to compute. Every field is checked at construction,
with a message that names field and value. Steps count optimiser steps, rows count rows of the global batch. No torch,
so that a run file is checked before torch is loaded.

Shapes: M models, D width, F latents.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.numerics import schedule
from pipeline.numerics.settings import (
    Bounds,
    CodeWeight,
    DecayFloat,
    Dtype,
    Inputs,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    Reconstruction,
    Settings,
)
from pipeline.numerics.sparsities.base import Sparsity
from pipeline.numerics.sparsities.batch_topk import BatchTopK


@dataclass(frozen=True, kw_only=True)
class FitSettings(Settings):
    """How one dictionary is fitted (arXiv 2504.02922, section 2; defaults are the paper's for BatchTopK)."""

    inputs: Inputs = "both"
    """Fit the dictionary on both models' activations, on chat - base (a difference SAE), or on the chat model's alone
    (a SAE). The last two are published as crosscoders of both models without base decoder rows: their Delta_norm is 1
    by construction, their FVE is that of what they read, and they are judged by the activations' ratio."""
    dedicated_frac: Annotated[float, Bounds(ge=0, le=0.5)] = 0.0
    """Share of the latents that only the chat model has, and as many that only the base model has; their Delta_norm is
    1 or 0 by construction. The verdict then rests on Latent Scaling's activation target."""
    code_weight: CodeWeight = "crosscoder"
    """What a latent costs: sum of its decoder norms, norm of both together, a mix, 1, or per model."""
    reconstruction: Reconstruction = "l2"
    """Mean unsquared L2 norm of the error, or the squared one."""
    init_norm: PositiveFloat | Literal["auto"] = "auto"
    """Decoder norm per latent and model at the start; auto is the sparsity's own, the paper's 0.005 for L1 and 1 for
    all others."""
    lr: PositiveFloat = 1e-4
    """Adam's learning rate after warm-up."""
    lr_warmup_steps: NonNegativeInt = 1000
    """Linear warm-up; a run shorter than this reaches only part of lr."""
    lr_decay_frac: Annotated[float, Bounds(ge=0, le=1)] = 0.0
    """Share of the run's end over which lr falls linearly to 0; 0 keeps it constant."""
    clip_norm: PositiveFloat | Literal["auto"] | None = "auto"
    """Global gradient norm limit; None does not clip. auto is the sparsity's own: as in the paper, L1 is not clipped,
    all others at 1."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of bounds, and for a SAE with latents or weights of one model."""
        super().__post_init__()
        if self.inputs != "both" and (self.dedicated_frac > 0 or self.code_weight == "decoupled"):
            raise ValueError(
                f"expected dedicated_frac = 0 and a code_weight other than decoupled for inputs {self.inputs!r}, got "
                f"{self.dedicated_frac} and {self.code_weight!r}: its dictionary reads one activation"
            )


def check_together(fit: FitSettings, sparsity: Sparsity) -> None:
    """Raises ValueError where the settings of a fit and those of its sparsity exclude each other."""
    is_plain = fit.inputs == "both" and fit.dedicated_frac == 0 and fit.code_weight != "decoupled"
    if sparsity.ties_first_group and not is_plain:
        raise ValueError(
            f"expected inputs both, dedicated_frac 0 and a code_weight other than decoupled for {sparsity.kind}, got "
            f"{fit.inputs!r}, {fit.dedicated_frac} and {fit.code_weight!r}: its shared latents belong to both models"
        )


@dataclass(frozen=True, kw_only=True)
class CrosscoderSpec(FitSettings):
    """One crosscoder to train on activations of a known shape."""

    num_models: PositiveInt
    """M."""
    activation_dim: PositiveInt
    """D."""
    num_latents: PositiveInt
    """F."""
    num_steps: PositiveInt
    """Optimiser steps of the whole run; the learning rate's decay ends there."""
    sparsity: Sparsity = field(default_factory=BatchTopK)
    """What keeps the codes sparse, with its own settings."""
    beta1: DecayFloat = 0.9
    """Adam's decay of the mean gradient per step."""
    beta2: DecayFloat = 0.999
    """Adam's decay of the mean squared gradient per step."""
    epsilon: PositiveFloat = 1e-8
    """Added to Adam's root mean square."""
    block_rows: PositiveInt | None = None
    """Rows whose pre-activations exist at a time: block_rows * F numbers of memory; no influence on the result. None
    takes blocks that suit the device."""
    precision: Precision = "float32"
    """Of the matrix products over float32 weights; see settings.Precision."""
    dtype: Dtype = "float32"
    """Of weights, gradients and Adam's moments; float64 is for tests."""
    kernels: str = "auto"
    """auto, reference, cpu or triton."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that makes no sense."""
        super().__post_init__()
        if self.precision != "float32" and self.dtype != "float32":
            raise ValueError(
                f"expected precision float32 with dtype {self.dtype}, got {self.precision}: change precision of the "
                f"crosscoder"
            )
        self.sparsity.check_size(self.num_latents)
        check_together(self, self.sparsity)
        is_plain = self.inputs == "both" and self.dedicated_frac == 0 and not self.sparsity.ties_first_group
        if not is_plain and self.num_models != 2:
            raise ValueError(
                f"expected num_models = 2 for inputs {self.inputs!r}, dedicated_frac {self.dedicated_frac} and "
                f"{self.sparsity.kind}, got {self.num_models}: a SAE's inputs, dedicated and shared latents belong to "
                f"one base and one chat model"
            )

    @property
    def start_norm(self) -> float:
        """init_norm, or the sparsity's own."""
        return self.sparsity.default_init_norm if self.init_norm == "auto" else self.init_norm

    @property
    def max_grad_norm(self) -> float | None:
        """clip_norm, or the sparsity's own."""
        return self.sparsity.default_clip_norm if self.clip_norm == "auto" else self.clip_norm

    def learning_rate(self, step: int) -> float:
        """Adam's learning rate at a step, after warm-up and decay."""
        return schedule.learning_rate(
            step, lr=self.lr, warmup_steps=self.lr_warmup_steps, num_steps=self.num_steps, decay_frac=self.lr_decay_frac
        )

    @property
    def fitted_models(self) -> int:
        """Models that the fitted dictionary reads and reconstructs: M, or 1 for a difference or the chat model."""
        return self.num_models if self.inputs == "both" else 1

    @property
    def num_dedicated(self) -> int:
        """Latents that belong to the chat model alone, and as many again that belong to the base model alone."""
        return int(self.dedicated_frac * self.num_latents)

    @property
    def threshold_shape(self) -> tuple[int, ...]:
        """Of the threshold that scores are held against: one number, one per model, or one per group of latents."""
        if self.sparsity.has_group_thresholds:
            return (len(self.sparsity.group_ends(self.num_latents)),)
        return (self.num_models,) if self.sparsity.compares_scores and self.code_weight == "decoupled" else ()

    def group_ends(self, latents: slice) -> tuple[int, ...]:
        """The ends of the sparsity's groups among a rank's latents, counted from the first of these."""
        size = latents.stop - latents.start
        return tuple(min(max(end - latents.start, 0), size) for end in self.sparsity.group_ends(self.num_latents))

    @property
    def aux_latents(self) -> int:
        """Dead latents per row in the auxiliary loss, before the number of dead ones limits it."""
        return self.sparsity.aux_k if self.sparsity.aux_k is not None else max(1, self.activation_dim // 2)
