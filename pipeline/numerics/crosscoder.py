"""The crosscoder: one dictionary that reads and reconstructs the activations of M models at once.

    f = relu(sum_m x^m . W_enc^m + b_enc)        xh^m = f . W_dec^m + b_dec^m        (arXiv 2504.02922, section 2)

This is the inference side: activations in, sparse codes out, reconstructions back, all in the units of the raw
activations (a normalisation, if the crosscoder was trained with one, is applied and inverted here and nowhere else).
Training has hand-written gradients (trainer.py). Here autograd follows `encode` and `decode` as it follows any module:
where the rows or codes ask for gradients, or the weights after `requires_grad_()`; a new crosscoder's weights do not.
M = 2 is model diffing, M = models x layers a multi-layer crosscoder, M = 1 an SAE; a difference SAE (recipes.py) is
published as a crosscoder of two models. A row's code does not depend on its neighbours. Files are read and written by
checkpoints/, which knows tensors and settings only and is imported when a method needs it.

Shapes: B rows, M models (0 = base, 1 = chat), D width, F latents, N = M * D, P active pairs.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, overload

import torch
from torch import Tensor, nn

from pipeline.numerics.batch import InferenceBlock
from pipeline.numerics.code_weight import code_weights, decoder_norms
from pipeline.numerics.codes import SparseCodes, concatenate, split_models
from pipeline.numerics.differentiable import asks_for_gradients, decoded, with_gradients
from pipeline.numerics.kernels.base import Kernels
from pipeline.numerics.kernels.choose import choose_kernels
from pipeline.numerics.settings import CODE_WEIGHTS, check_choice
from pipeline.numerics.sparsities.base import Sparsity
from pipeline.numerics.sparsities.registry import sparsity_of_activation

if TYPE_CHECKING:
    from pipeline.checkpoints.layouts import PublishedCrosscoder

_log = logging.getLogger(__name__)
_BLOCK_NUMBERS = 1 << 25
"""Pre-activations computed at a time; 128 MiB in float32."""


class Normalisation(NamedTuple):
    """x' = (x - mean_MD) * scale_M, what the dictionary sees; its reconstruction is mapped back."""

    mean_MD: Tensor
    scale_M: Tensor
    """> 0; target_rms / sqrt(sum_d var_d) for the usual choice."""


def activation_difference(x_BMD: Tensor) -> Tensor:
    """x^chat - x^base, [B, 1, D]: the input of a difference SAE, which is a crosscoder with M = 1."""
    if x_BMD.shape[1] != 2:
        raise ValueError(f"expected activations of 2 models, got {x_BMD.shape[1]}: a difference needs exactly a pair")
    return x_BMD[:, 1:] - x_BMD[:, :1]


class Crosscoder(nn.Module):
    """Encoder and decoder over M models; `encode`, `decode`, `forward` take and return raw activations."""

    mean_MD: Tensor
    scale_M: Tensor
    threshold: Tensor
    jump_threshold_F: Tensor

    def __init__(
        self,
        num_latents: int,
        num_models: int,
        activation_dim: int,
        *,
        activation: str = "relu",
        code_weight: str = "crosscoder",
        k: int | None = None,
    ) -> None:
        """All weights are 0 (training and loading fill them); float32.

        activation is one of the sparsities' (sparsities/registry.py): relu (trained with L1), batch_topk, topk,
        jumprelu. k is needed by batch_topk and topk alone.
        """
        super().__init__()
        needed = sparsity_of_activation(activation).published_tensors
        check_choice("code_weight", code_weight, CODE_WEIGHTS)
        if min(num_latents, num_models, activation_dim) < 1:
            raise ValueError(
                f"expected positive sizes, got num_latents={num_latents}, num_models={num_models}, "
                f"activation_dim={activation_dim}: the shape of the dictionary must be known"
            )
        if "k" in needed and (k is None or not 1 <= k <= num_latents):
            raise ValueError(f"expected 1 <= k <= num_latents = {num_latents} for {activation}, got k={k}: set k")
        self.activation = activation
        self.code_weight = code_weight
        self.k = k
        shape = (num_latents, num_models, activation_dim)
        single = torch.float32  # explicit, so that the caller's default dtype does not decide
        self.W_enc_FMD = nn.Parameter(torch.zeros(shape, dtype=single), requires_grad=False)
        self.b_enc_F = nn.Parameter(torch.zeros(num_latents, dtype=single), requires_grad=False)
        self.W_dec_FMD = nn.Parameter(torch.zeros(shape, dtype=single), requires_grad=False)
        self.b_dec_MD = nn.Parameter(torch.zeros(shape[1:], dtype=single), requires_grad=False)
        per_model = self.sparsity.compares_scores and code_weight == "decoupled"
        self.register_buffer("threshold", torch.zeros(num_models if per_model else (), dtype=torch.float64))
        num_jumps = num_latents if "jump_threshold" in needed else 0
        self.register_buffer("jump_threshold_F", torch.zeros(num_jumps, dtype=single))
        self.register_buffer("mean_MD", torch.zeros(shape[1:], dtype=single))
        self.register_buffer("scale_M", torch.ones(num_models, dtype=single))
        self.is_normalised = False
        self._kernels: Kernels | None = None

    @property
    def sparsity(self) -> type[Sparsity]:
        """How codes are kept sparse."""
        return sparsity_of_activation(self.activation)

    @property
    def num_latents(self) -> int:
        """F."""
        return self.W_dec_FMD.shape[0]

    @property
    def num_models(self) -> int:
        """M."""
        return self.W_dec_FMD.shape[1]

    @property
    def activation_dim(self) -> int:
        """D."""
        return self.W_dec_FMD.shape[2]

    @property
    def kernels(self) -> Kernels:
        """The sparse kernels of the device that the weights are on."""
        if self._kernels is None:
            self._kernels = choose_kernels(self.W_dec_FMD.device)
        return self._kernels

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kernels = None  # another device may need other kernels
        threshold = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Kept in double whatever the weights' dtype: scores equal to the float32 threshold would flip with rounding.
        self.threshold = threshold.to(self.threshold.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernels": None}  # chosen anew where the copy arrives

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # A state dict holds tensors alone, so the flag follows from the buffers.
        self.is_normalised = bool((self.mean_MD != 0).any()) or bool((self.scale_M != 1).any())

    def set_normalisation(self, normalisation: Normalisation | None) -> None:
        """Sets (or with None removes) the map between raw activations and what the dictionary sees."""
        self.is_normalised = normalisation is not None
        if normalisation is None:
            self.mean_MD.zero_()
            self.scale_M.fill_(1)
            return
        check_normalisation(normalisation, self.num_models, self.activation_dim)
        self.mean_MD.copy_(normalisation.mean_MD)
        self.scale_M.copy_(normalisation.scale_M)

    @property
    def normalisation(self) -> Normalisation | None:
        """The map from raw activations, or None."""
        return Normalisation(self.mean_MD, self.scale_M) if self.is_normalised else None

    @torch.no_grad()
    def code_weights_F(self) -> Tensor:  # noqa: N802 (shape letter)
        """w_j, what a latent costs, [F]; taken in the dictionary's own (normalised) units."""
        return code_weights(decoder_norms(self.W_dec_FMD), self.code_weight)

    @torch.no_grad()
    def raw_decoder_FMD(self) -> Tensor:  # noqa: N802 (shape letter)
        """Decoder directions in units of raw activations: W_dec_FMD / scale_M, [F, M, D].

        What a code adds to a residual stream. Delta_norm uses W_dec_FMD itself, whose models are on one scale.
        """
        return self.W_dec_FMD / self.scale_M[:, None] if self.is_normalised else self.W_dec_FMD.detach()

    def encode(self, x_BMD: Tensor) -> SparseCodes:
        """Sparse codes of raw activations, in inference mode: a row's code depends on that row alone.

        Args:
            x_BMD: raw activations [B, M, D] on the weights' device; any floating dtype; B may be 0.

        Returns:
            Codes f > 0 in the weights' dtype. batch_topk keeps scores v > threshold; with the threshold at 0 (not
            trained yet) that is every positive code. Rows with NaN have no codes.
        """
        x_BN = self._flatten(x_BMD)
        codes = self._encode(x_BN)
        if asks_for_gradients(x_BN, self.W_enc_FMD, self.b_enc_F):
            return with_gradients(codes, x_BN, self.W_enc_FMD.flatten(1), self.b_enc_F, self.kernels)
        return codes

    @torch.no_grad()
    def _encode(self, x_BN: Tensor) -> SparseCodes:
        rows = max(1, _BLOCK_NUMBERS // self.num_latents)
        W_enc_NF = self.W_enc_FMD.flatten(1).T
        weight_F = self.code_weights_F()
        blocks = [x_BN[start : start + rows] for start in range(0, max(len(x_BN), 1), rows)]
        return concatenate([self._sparsify(torch.addmm(self.b_enc_F, block, W_enc_NF), weight_F) for block in blocks])

    def decode(self, codes: SparseCodes | Tensor) -> Tensor:
        """Reconstructed raw activations x_BMD from sparse codes or from a dense code_BF."""
        num_latents = codes.num_latents if isinstance(codes, SparseCodes) else codes.shape[-1]
        if num_latents != self.num_latents:
            raise ValueError(
                f"expected codes over {self.num_latents} latents, got {num_latents}: these codes belong to another "
                f"crosscoder"
            )
        W_dec_FN = self.W_dec_FMD.flatten(1)
        if not isinstance(codes, SparseCodes):
            xh_BN = codes @ W_dec_FN
        elif codes.model_mask_PM is None:
            xh_BN = self._decode(codes, W_dec_FN)
        else:
            xh_BN = self._decode(split_models(codes).codes, W_dec_FN.view(-1, self.activation_dim))
        xh_BMD = xh_BN.view(-1, self.num_models, self.activation_dim) + self.b_dec_MD
        return xh_BMD / self.scale_M[:, None] + self.mean_MD if self.is_normalised else xh_BMD

    @overload
    def forward(self, x_BMD: Tensor, output_features: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x_BMD: Tensor, output_features: Literal[True]) -> tuple[Tensor, SparseCodes]: ...
    def forward(self, x_BMD: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, SparseCodes]:
        """The reconstruction of raw activations, with the codes beside it if output_features."""
        codes = self.encode(x_BMD)
        x_hat_BMD = self.decode(codes)
        return (x_hat_BMD, codes) if output_features else x_hat_BMD

    def extra_repr(self) -> str:
        """Sizes and kind, for print."""
        return (
            f"num_latents={self.num_latents}, num_models={self.num_models}, activation_dim={self.activation_dim}, "
            f"activation={self.activation}, code_weight={self.code_weight}, k={self.k}"
        )

    def _decode(self, codes: SparseCodes, W_dec_FN: Tensor) -> Tensor:
        if asks_for_gradients(codes.values_P, W_dec_FN):
            return decoded(codes, W_dec_FN, self.kernels)
        return self.kernels.decode(codes, W_dec_FN)

    def _flatten(self, x_BMD: Tensor) -> Tensor:
        """Normalised activations as rows x_BN in the weights' dtype."""
        check_activations(x_BMD, self.num_models, self.activation_dim)
        x_BMD = x_BMD.to(self.W_enc_FMD.dtype)
        if self.is_normalised:
            x_BMD = (x_BMD - self.mean_MD) * self.scale_M[:, None]
        return x_BMD.flatten(1)

    def _sparsify(self, preact_BF: Tensor, weight_F: Tensor) -> SparseCodes:
        return self.sparsity.select_at_inference(
            InferenceBlock(
                preact_BF,
                weight_F,
                self.W_dec_FMD.detach(),
                is_decoupled=self.code_weight == "decoupled",
                kernels=self.kernels,
                k=self.k,
                threshold=self.threshold,
                jump_threshold_F=self.jump_threshold_F,
            )
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        activation_scale: Sequence[float] | None = None,
    ) -> "Crosscoder":
        """A crosscoder from a folder, a file or a hub id, in any published layout, on the CPU in float32.

        Args:
            source: folder, weights file or hub id `owner/name[/subfolder]`.
            revision: branch, tag or commit, for hub ids alone.
            subfolder: where the files are within a folder or a hub repository.
            activation_scale: one factor per model, for the layout that does not store what its activations were
                scaled by (`cfg.json` with `cc_weights.pt`); without it such a file loads with a warning.

        Raises InputError for what cannot be read.
        """
        from pipeline.checkpoints.published import read_published  # only here: mathematics needs torch alone

        checkpoint = read_published(source, revision=revision, subfolder=subfolder, activation_scale=activation_scale)
        if checkpoint.is_scale_unknown:
            _log.warning(
                "%s was trained on activations scaled to mean norm sqrt(D) = %.1f per model, and the scales are not in "
                "the file: give it activations scaled so, or pass activation_scale=(sqrt(D) / mean |x| of each model)",
                source,
                checkpoint.activation_dim**0.5,
            )
        return cls.from_checkpoint(checkpoint)

    @classmethod
    def from_checkpoint(cls, checkpoint: "PublishedCrosscoder") -> "Crosscoder":
        """The module of a checkpoint that was read; shares its weights' memory."""
        crosscoder = cls(
            checkpoint.num_latents,
            checkpoint.num_models,
            checkpoint.activation_dim,
            activation=checkpoint.sparsity.activation,
            code_weight=checkpoint.code_weight,
            k=checkpoint.k,
        )
        for name in ("W_enc_FMD", "b_enc_F", "W_dec_FMD", "b_dec_MD"):
            getattr(crosscoder, name).data = getattr(checkpoint, name)
        if checkpoint.threshold is not None:
            crosscoder.threshold.copy_(checkpoint.threshold)
        if checkpoint.jump_threshold_F is not None:
            crosscoder.jump_threshold_F.copy_(checkpoint.jump_threshold_F)
        if checkpoint.norm is not None:
            crosscoder.set_normalisation(Normalisation(checkpoint.norm.mean_MD, checkpoint.norm.scale_M))
        return crosscoder

    def to_checkpoint(self) -> "PublishedCrosscoder":
        """What goes into a file: float32 on the CPU, whatever the module's dtype and device."""
        from pipeline.checkpoints.layouts import ActivationNorm, PublishedCrosscoder

        needed = self.sparsity.published_tensors
        norm = None
        if self.is_normalised:
            norm = ActivationNorm(self.mean_MD.float().cpu(), self.scale_M.float().cpu())
        return PublishedCrosscoder(
            **{
                name: getattr(self, name).detach().to("cpu", torch.float32)
                for name in ("W_enc_FMD", "b_enc_F", "W_dec_FMD", "b_dec_MD")
            },
            code_weight=self.code_weight,
            dict_class=self.sparsity.published_class,
            k=self.k if "k" in needed else None,
            threshold=self.threshold.detach().cpu() if "threshold" in needed else None,
            jump_threshold_F=self.jump_threshold_F.float().cpu() if "jump_threshold" in needed else None,
            norm=norm,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json in the published layout, each file atomically.

        Loaded again, a float32 crosscoder is the same to the last bit, its threshold included.
        """
        from pipeline.checkpoints.export import write_published

        write_published(folder, self.to_checkpoint())

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Uploads what `save_pretrained` writes to the hub; returns the commit's address."""
        from pipeline.checkpoints.hub import push_published

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_published(repo_id, folder, private=private)


def check_activations(x_BMD: Tensor, num_models: int, activation_dim: int) -> None:
    """Raises ValueError unless x is floating point with shape [B, num_models, activation_dim]."""
    if x_BMD.ndim != 3 or x_BMD.shape[1:] != (num_models, activation_dim) or not x_BMD.is_floating_point():
        raise ValueError(
            f"expected floating-point activations [B, M={num_models}, D={activation_dim}], got {x_BMD.dtype} "
            f"{list(x_BMD.shape)}: the crosscoder belongs to other models or another layer"
        )


def check_normalisation(normalisation: Normalisation, num_models: int, activation_dim: int) -> None:
    """Raises ValueError unless the shapes fit and every scale is finite and positive."""
    mean_MD, scale_M = normalisation
    if mean_MD.shape != (num_models, activation_dim) or scale_M.shape != (num_models,):
        raise ValueError(
            f"expected a normalisation with mean [{num_models}, {activation_dim}] and scale [{num_models}], got "
            f"{list(mean_MD.shape)} and {list(scale_M.shape)}: take the moments of these activations"
        )
    scales = scale_M.tolist()
    if not bool(mean_MD.isfinite().all()) or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"expected finite means and positive scales, got scales {scales}: an activation is constant")
