"""What a sparsity is: its settings, and its answer to everything that training, inference and files ask of it.

A sparsity is a frozen dataclass in a file of its own and a line in registry.py. Its fields are its hyper-parameters,
documented under each field; a run file's section is built from them. Its methods are its arithmetic. Tensors and the
selections of selection.py come in through a TrainingBatch or an InferenceBlock (batch.py): nothing here imports torch,
so that a run file is checked before torch is loaded.

For inference a crosscoder keeps k, one threshold, and one threshold per latent; a sparsity says which of them it needs
(published_tensors), and files hold those. What cannot be said with these three numbers needs a change of the layout.
A sparsity that differs from another in training alone has that one's activation and class, and is read as that one.

A sparsity may divide the dictionary into groups of consecutive latents, for losses or rules of their own.

Shapes: B rows, M models, F latents of this rank, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pipeline.numerics.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.numerics.batch import InferenceBlock, TrainingBatch
    from pipeline.numerics.codes import SparseCodes

DEAD_AFTER_ROWS = 10_000_000
"""Rows without firing after which a latent counts as dead, where a sparsity has no setting for it."""


class Kept(NamedTuple):
    """The pairs that a training step works on."""

    codes: SparseCodes
    smallest: Tensor | None = None
    """float64, scalar or [M]: the smallest kept score of the global batch, 0 if nothing was kept; None if scores are
    not compared over the batch."""
    preact_P: Tensor | None = None
    """Pre-activation of every pair, where a threshold is trained; codes then hold 0 for pairs just below it."""


class CodePenalty(NamedTuple):
    """A penalty on the codes, and its gradients."""

    loss: Tensor
    """Scalar: this rank's share."""
    grad_weight_F: Tensor
    """dL/dw_j."""
    grad_code_F: Tensor
    """dL/df_ij, the same on every row where latent j fired."""


class DenseCodes(NamedTuple):
    """The codes of a block of rows with their zeros."""

    code_BF: Tensor
    near_BF: Tensor | None = None
    """Where a threshold is trained: whether the pre-activation moves it."""


class ThresholdGradients(NamedTuple):
    """Gradients of a step on pairs, where a threshold is trained."""

    penalty: Tensor
    """Scalar: this rank's share."""
    grad_P: Tensor
    """dL/dpreact."""
    grad_threshold_P: Tensor
    """Every pair's part of dL/dlog(threshold)."""


class DenseThresholdGradients(NamedTuple):
    """The same of a step on dense codes."""

    penalty: Tensor
    grad_threshold_F: Tensor


@dataclass(frozen=True, kw_only=True)
class Sparsity(Settings):
    """One way to keep codes sparse; the defaults are those of plain ReLU codes without a penalty."""

    kind: ClassVar[str]
    """Name in run files."""
    activation: ClassVar[str]
    """Name of the crosscoder's activation, Crosscoder(activation=...)."""
    published_class: ClassVar[str]
    """`dict_class` in the published layout."""
    published_tensors: ClassVar[tuple[str, ...]] = ()
    """What inference needs and files hold, in this order: k, threshold, jump_threshold (one per latent)."""
    default_init_norm: ClassVar[float] = 1.0
    """Decoder norm at the start where the settings name none; also `norm_init_scale` in files of crosscoders whose
    training is not known."""
    default_clip_norm: ClassVar[float | None] = 1.0
    """Gradient norm limit where the settings name none."""
    compares_scores: ClassVar[bool] = False
    """Whether scores are held against one threshold; it is one per model under the decoupled code weight."""
    starts_at_median: ClassVar[bool] = False
    """Whether the decoder bias starts at the geometric median of the first batch."""
    penalises_codes: ClassVar[bool] = False
    """Whether code_penalty is asked for."""
    may_be_dense: ClassVar[bool] = False
    """Whether a step may work on dense codes: for sparsities that begin with about half of all codes active."""
    is_nested: ClassVar[bool] = False
    """Whether the latents up to the end of every group have to reconstruct the rows by themselves."""
    ties_first_group: ClassVar[bool] = False
    """Whether a latent of the first group has the same decoder row in every model."""
    has_group_thresholds: ClassVar[bool] = False
    """Whether scores of each group are held against a threshold of their own; files then hold one per latent."""

    @property
    def k(self) -> int | None:
        """Active latents per row, where they are counted."""
        return None

    @property
    def aux_weight(self) -> float:
        """Weight of the auxiliary loss of dead latents; 0 for none."""
        return 0.0

    @property
    def aux_k(self) -> int | None:
        """Dead latents per row in the auxiliary loss; None for half the activation width."""
        return None

    @property
    def dead_after_rows(self) -> int:
        """A latent that has not fired for this many rows is dead."""
        return DEAD_AFTER_ROWS

    @property
    def target_l0(self) -> float | None:
        """L0 that the penalty's weight is steered to; None where the weight stays what the settings say."""
        return None

    @property
    def mu_warmup_steps(self) -> int:
        """Steps before the penalty has its whole weight."""
        return 0

    @property
    def initial_threshold(self) -> float | None:
        """Every latent's trained threshold at the start, in units of the first batch's pre-activations; None where
        none is trained."""
        return None

    @property
    def threshold_lr_factor(self) -> float:
        """Learning rate of the trained thresholds' logarithms, as a multiple of the weights'."""
        return 1.0

    @property
    def start_threshold(self) -> float:
        """The threshold of inference before the first step."""
        return 0.0

    @property
    def delta_weight(self) -> float:
        """Weight of the loss of the models' difference; 0 for none."""
        return 0.0

    def group_ends(self, num_latents: int) -> tuple[int, ...]:
        """The first latent after each group, ascending; the last is num_latents."""
        return (num_latents,)

    def check_size(self, num_latents: int) -> None:
        """Raises ValueError if the settings do not fit a dictionary of this size."""

    def active_latents(self, step: int) -> float:  # noqa: ARG002
        """Mean active latents per row that a step keeps; 0 where they are not counted."""
        return 0.0

    def penalty_weight(self, step: int) -> float:  # noqa: ARG002
        """Weight of the penalty at a step; 0 for no penalty."""
        return 0.0

    # Training.

    def select_in_training(self, batch: TrainingBatch, k: float) -> Kept:
        """The pairs of a global batch that a step keeps, with k = active_latents(step). Collective over the mesh."""
        raise NotImplementedError(f"{self.kind} does not say what it keeps in training")

    def next_threshold(self, threshold: Tensor, smallest: Tensor, *, step: int, num_steps: int) -> Tensor:  # noqa: ARG002
        """The threshold of inference after a step of num_steps, float64, from what it was and from Kept.smallest."""
        return threshold

    def code_penalty(
        self, sums_F: Tensor, weight_F: Tensor, *, scale: float, group_ends: tuple[int, ...]
    ) -> CodePenalty:
        """The penalty from sum_i f_ij and w_j of every latent; scale is penalty_weight / rows of the global batch.

        group_ends are those of this rank's latents.
        """
        raise NotImplementedError(f"{self.kind} has no penalty on codes")

    def threshold_gradients(
        self, codes: SparseCodes, preact_P: Tensor, *, grad_P: Tensor, log_threshold_F: Tensor, scale: float
    ) -> ThresholdGradients:
        """Gradients where Kept.preact_P was given, from grad_P = dL/df of every pair; scale as for code_penalty."""
        raise NotImplementedError(f"{self.kind} trains no threshold")

    # Training on dense codes, where may_be_dense.

    def least_preactivation(self, log_threshold_F: Tensor | None) -> Tensor | float:  # noqa: ARG002
        """Pre-activation above which a pair has a gradient, [F] or one number for all latents."""
        return 0.0

    def dense_codes(self, preact_BF: Tensor, log_threshold_F: Tensor | None) -> DenseCodes:  # noqa: ARG002
        """Codes of a block, in the memory of its pre-activations."""
        return DenseCodes(preact_BF.relu_())

    def dense_threshold_gradients(
        self, codes: DenseCodes, *, grad_BF: Tensor, num_active: Tensor, log_threshold_F: Tensor, scale: float
    ) -> DenseThresholdGradients:
        """Gradients where DenseCodes.near_BF was given, from grad_BF = dL/df; num_active counts the block's codes."""
        raise NotImplementedError(f"{self.kind} trains no threshold")

    # Inference. No settings but those of the block: a crosscoder read from a file has no others.

    @classmethod
    def latent_thresholds(cls, threshold: Tensor, weight_F: Tensor, group_ends: tuple[int, ...]) -> Tensor:
        """Where has_group_thresholds: the group's threshold of scores f w as one of codes f, for every latent, [F]."""
        raise NotImplementedError(f"{cls.kind} has one threshold")

    @classmethod
    def select_at_inference(cls, block: InferenceBlock) -> SparseCodes:
        """Codes of a block of rows; a row's codes depend on that row alone."""
        raise NotImplementedError(f"{cls.kind} does not say what it keeps at inference")
