"""Everything that defines the training of one crosscoder, as plain checked numbers.

The pipeline's configuration is translated into this; mathematics never sees a configuration section. Every field is
validated at construction with a message that names both values. Steps count optimiser steps, rows count rows of the
global batch.

Shapes: M models, D width, F latents.
"""

import math
from dataclasses import dataclass

from pipeline.numerics.objective import RECONSTRUCTIONS
from pipeline.numerics.rules import check_active_latents, check_recipe
from pipeline.numerics.sparsity import CODE_WEIGHTS, KINDS, check_choice

PRECISIONS = ("float32", "tf32", "bfloat16")
"""Of matrix products over float32 weights. tf32 needs CUDA. bfloat16 rounds the factors of the encoder's product, on
any device (on CUDA its sums stay float32 and all other dense products run in TF32)."""
INPUTS = ("both", "difference")
"""What a dictionary is fitted on: the activations of all models at once, or x^chat - x^base."""
DTYPES = ("float32", "float64")
"""Of weights, gradients and Adam's moments; float64 is for tests."""


@dataclass(frozen=True, kw_only=True)
class CrosscoderSpec:
    """One crosscoder to train (arXiv 2504.02922, section 2; defaults are the paper's for Gemma-2-2b BatchTopK)."""

    num_models: int
    """M."""
    activation_dim: int
    """D."""
    num_latents: int
    """F."""
    num_steps: int
    """Optimiser steps of the whole run; the learning rate's decay ends there."""
    kind: str = "batch_topk"
    """l1, batch_topk, topk or jumprelu."""
    inputs: str = "both"
    """both, or difference: a dictionary of x^chat - x^base, published as a crosscoder of the pair (recipes.py)."""
    dedicated_frac: float = 0.0
    """Share of the latents that belong to the chat model alone, and as many to the base model alone: the other model's
    encoder and decoder rows are 0 for good. 0 leaves every latent free."""
    k: int | None = None
    """Mean active latents per row (batch_topk) or exactly (topk)."""
    k_start: int | None = None
    """batch_topk: k at step 0, going linearly to k over k_anneal_steps."""
    k_anneal_steps: int = 0
    """0 means k from the first step, whatever k_start is."""
    mu: float = 0.0
    """l1: weight of the penalty. jumprelu: weight of the mean number of active latents."""
    mu_warmup_steps: int = 0
    """The penalty grows linearly over this many steps."""
    bandwidth: float = 0.01
    """jumprelu: width of the straight-through estimator around the threshold."""
    initial_threshold: float = 0.01
    """jumprelu: every latent's threshold at the start."""
    code_weight: str = "crosscoder"
    reconstruction: str = "l2"
    aux_weight: float = 1 / 32
    """batch_topk, topk: weight of the auxiliary loss; 0 turns it off."""
    aux_k: int | None = None
    """Dead latents per row in the auxiliary loss; None means D / 2."""
    dead_after_rows: int = 10_000_000
    """A latent that has not fired for this many rows is dead."""
    lr: float = 1e-4
    lr_warmup_steps: int = 1000
    lr_decay_frac: float = 0.0
    """Share of num_steps at the end over which lr falls linearly."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None does not clip."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    """Adam's."""
    threshold_decay: float = 0.999
    """Per step, of the inference threshold's moving average."""
    threshold_start_step: int = 1000
    """First step of the moving average; before it the threshold is the last step's smallest kept score."""
    init_norm: float = 1.0
    """Norm of every latent's decoder row per model at the start (0.005 for L1 in the paper)."""
    seed: int = 0
    """Of the initial directions."""
    block_rows: int | None = None
    """Rows whose pre-activations exist at a time: block_rows * F numbers of memory; no influence on the result. None
    takes blocks that suit the device."""
    precision: str = "float32"
    dtype: str = "float32"
    kernels: str = "auto"
    """auto, reference, cpu or triton."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that makes no sense."""
        check_choice("kind", self.kind, KINDS)
        check_choice("code_weight", self.code_weight, CODE_WEIGHTS)
        check_choice("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        check_choice("inputs", self.inputs, INPUTS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("dtype", self.dtype, DTYPES)
        is_fitting = self.precision == "float32" or self.dtype == "float32"
        self._require("precision", is_fitting, f"float32 with dtype {self.dtype}")
        for name in ("num_models", "activation_dim", "num_latents", "num_steps", "dead_after_rows"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("mu_warmup_steps", "k_anneal_steps", "lr_warmup_steps", "threshold_start_step", "seed"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("mu", "aux_weight"):
            self._require(name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, ">= 0 and finite")
        for name in ("lr", "init_norm", "bandwidth", "initial_threshold", "epsilon"):
            self._require(name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0, "> 0 and finite")
        for name in ("beta1", "beta2", "threshold_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("lr_decay_frac", 0 <= self.lr_decay_frac <= 1, "in [0, 1]")
        self._require("dedicated_frac", 0 <= self.dedicated_frac <= 0.5, "in [0, 0.5]")
        self._require("clip_norm", self.clip_norm is None or self.clip_norm > 0, "> 0, or None")
        self._require("block_rows", self.block_rows is None or self.block_rows >= 1, ">= 1, or None")
        self._require("aux_k", self.aux_k is None or self.aux_k >= 1, ">= 1, or None")
        if self.kind in ("batch_topk", "topk"):
            check_active_latents("k", self.k, num_latents=self.num_latents, kind=self.kind)
            if self.k_start is not None:
                check_active_latents("k_start", self.k_start, num_latents=self.num_latents, kind=self.kind)
        self._check_recipe()

    @property
    def fitted_models(self) -> int:
        """Models that the fitted dictionary reads and reconstructs: 1 for a difference, else M."""
        return 1 if self.inputs == "difference" else self.num_models

    @property
    def num_dedicated(self) -> int:
        """Latents that belong to the chat model alone, and as many again that belong to the base model alone."""
        return int(self.dedicated_frac * self.num_latents)

    @property
    def activation(self) -> str:
        """The activation of the crosscoder for inference."""
        return "relu" if self.kind == "l1" else self.kind

    @property
    def has_auxiliary(self) -> bool:
        """Whether dead latents get an auxiliary loss."""
        return self.kind in ("batch_topk", "topk") and self.aux_weight > 0

    @property
    def aux_latents(self) -> int:
        """Dead latents per row in the auxiliary loss, before the number of dead ones limits it."""
        return self.aux_k if self.aux_k is not None else max(1, self.activation_dim // 2)

    def _check_recipe(self) -> None:
        is_plain = self.inputs == "both" and self.dedicated_frac == 0
        if not is_plain and self.num_models != 2:
            raise ValueError(
                f"expected num_models = 2 for inputs {self.inputs!r} and dedicated_frac {self.dedicated_frac}, got "
                f"{self.num_models}: a difference and dedicated latents belong to one base and one chat model"
            )
        check_recipe(inputs=self.inputs, dedicated_frac=self.dedicated_frac, code_weight=self.code_weight)

    def _require(self, name: str, is_good: bool, expected: str) -> None:
        if not is_good:
            raise ValueError(f"expected {name} {expected}, got {getattr(self, name)}: change {name} of the crosscoder")
