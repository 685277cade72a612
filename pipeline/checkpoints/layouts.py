"""Translates the tensors and settings of published crosscoders into ours, and back. No disk, no network.

Two layouts exist. "published": `encoder.weight` [M, D, F] and friends, with the settings in tensors and in
`config.json`. "scaled": `W_enc` [M, D, F], `W_dec` [F, M, D], trained on activations that somebody else multiplied by
one number per model (mean norm sqrt(D)); that number is not in the file. Whatever could be read in two ways is an error
that says where, because a wrong reading would still give plausible latents. A file with a tensor that this version does
not know is therefore refused, not loaded in part.

F latents, M models, D width. Weights in memory are rows per latent: W_enc_FMD, W_dec_FMD.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoints.published_types import check_settings_types, check_tensor_types
from pipeline.errors import InputError, short
from pipeline.numerics.settings import CODE_WEIGHTS
from pipeline.numerics.sparsities.base import Sparsity
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.sparsities.registry import sparsity_by_class

MIXED_ALPHAS = {"code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1}
"""The only mix of norms that the code weight `mixed` stands for."""
NORM_EPSILON = 1e-8
"""Added to the variance before the root by the published code."""

WEIGHT_KEYS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
CODE_KEYS = ("k", "threshold", "jump_threshold")
"""What inference may need; Sparsity.published_tensors says which of them belong to a `dict_class`. The classes of TopK
and JumpReLU are crossray's own, under names that make other readers stop."""
NORM_KEYS = ("target_rms", "activation_mean", "activation_std", "activation_global_scale")
PUBLISHED_KEYS = (*WEIGHT_KEYS, *CODE_KEYS, "code_normalization_id", *NORM_KEYS)
SCALED_KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")
OWN_SETTINGS = "crossray"
"""Name, in the settings and in the safetensors header, of what crossray keeps beside the published fields."""


class ActivationNorm(NamedTuple):
    """The normalisation that a crosscoder was trained behind: x' = (x - mean_MD) * scale_M, inverted on decode."""

    mean_MD: Tensor
    """float32 [M, D], subtracted first."""
    scale_M: Tensor
    """float32 [M], target_rms / sqrt(sum_d var_d) in published files; > 0."""
    std_MD: Tensor | None = None
    """float32 [M, D], standard deviations that scale_M was made of; None where only the scale is known."""
    target_rms: float = 1.0
    """Root mean square norm of the normalised activation."""


class PublishedCrosscoder(NamedTuple):
    """One crosscoder as its file has it, in our memory layout. Weights are float32 and finite."""

    W_enc_FMD: Tensor
    b_enc_F: Tensor
    W_dec_FMD: Tensor
    b_dec_MD: Tensor
    code_weight: str = "crosscoder"
    """One of CODE_WEIGHTS: what the threshold is compared with is f_j times this weight of latent j."""
    dict_class: str = L1.published_class
    """Published name of a sparsity: how codes are made of pre-activations."""
    k: int | None = None
    """Mean active latents per row asked for in training; None for ReLU and JumpReLU codes."""
    threshold: Tensor | None = None
    """float64, scalar, or [M] for `decoupled`: BatchTopK keeps f_j where f_j w_j > threshold. None where not needed."""
    jump_threshold_F: Tensor | None = None
    """float32 [F]: JumpReLU keeps f_j where f_j > jump_threshold_j. None where not needed."""
    norm: ActivationNorm | None = None
    """None: activations enter as they are."""
    is_scale_unknown: bool = False
    """The file was trained on scaled activations and nobody said by how much: x must arrive already scaled."""
    settings: Mapping[str, Any] = {}
    """`config.json` (or `cfg.json`) and, under "trainer", `trainer_config.json`, as found."""

    @property
    def sparsity(self) -> type[Sparsity]:
        """The sparsity of dict_class."""
        return sparsity_by_class()[self.dict_class]

    @property
    def num_latents(self) -> int:
        """F."""
        return self.W_enc_FMD.shape[0]

    @property
    def num_models(self) -> int:
        """M."""
        return self.W_enc_FMD.shape[1]

    @property
    def activation_dim(self) -> int:
        """D."""
        return self.W_enc_FMD.shape[2]


def read_layout(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    where: str,
    activation_scale: Sequence[float] | None = None,
) -> PublishedCrosscoder:
    """The crosscoder in `tensors`, whichever layout they are in.

    `settings` is what `config.json` or `cfg.json` holds ({} where there is none), with the trainer's settings under
    "trainer". `activation_scale` (one number per model) is only for the "scaled" layout. `where` names the file in
    messages. Raises InputError for missing or unknown tensors, shapes that disagree with each other or with the
    settings, numbers that are not finite, and settings whose meaning is not known.
    """
    named = {_strip_compiled(key): tensor for key, tensor in tensors.items()}
    check_settings_types(settings, where)
    check_tensor_types(named, where)
    if "W_enc" in named:
        return _read_scaled(named, settings, where, activation_scale)
    if activation_scale is not None:
        raise InputError(
            f"activation_scale is for files with W_enc/W_dec tensors, came {list(activation_scale)} for {where}, whose "
            f"own normalisation (if any) is stored in it: leave activation_scale out"
        )
    return _read_published(named, settings, where)


def _strip_compiled(key: str) -> str:
    while key.startswith("_orig_mod."):  # written by a module that was wrapped by torch.compile
        key = key.removeprefix("_orig_mod.")
    return key


def _read_published(named: dict[str, Tensor], settings: Mapping[str, Any], where: str) -> PublishedCrosscoder:
    _check_keys(named, WEIGHT_KEYS, PUBLISHED_KEYS, where)
    W_dec_MFD = finite_weights(named, "decoder.weight", 3, where)
    M, F, D = W_dec_MFD.shape
    W_enc_MDF = _spread_encoder(finite_weights(named, "encoder.weight", 3, where), M, settings, where)
    _check_shape("encoder.weight", W_enc_MDF, (M, D, F), "decoder.weight [M, F, D]", where)
    b_enc_F = finite_weights(named, "encoder.bias", 1, where)
    _check_shape("encoder.bias", b_enc_F, (F,), "decoder.weight [M, F, D]", where)
    b_dec_MD = finite_weights(named, "decoder.bias", 2, where)
    _check_shape("decoder.bias", b_dec_MD, (M, D), "decoder.weight [M, F, D]", where)
    _check_settings(settings, {"activation_dim": D, "dict_size": F, "num_layers": M, "num_decoder_layers": M}, where)
    code_weight = _code_weight(named, settings, where)
    sparsity = _sparsity(named, settings, where)
    keys = sparsity.published_tensors
    threshold_shape = (M,) if sparsity.compares_scores and code_weight == "decoupled" else ()
    if "jump_threshold" in keys:
        _check_shape("jump_threshold", named["jump_threshold"], (F,), "decoder.weight [M, F, D]", where)
    return PublishedCrosscoder(
        W_enc_FMD=_copy(W_enc_MDF.permute(2, 0, 1)),
        b_enc_F=_copy(b_enc_F),
        W_dec_FMD=_copy(W_dec_MFD.permute(1, 0, 2)),
        b_dec_MD=_copy(b_dec_MD),
        code_weight=code_weight,
        dict_class=sparsity.published_class,
        k=_number_of_active(named["k"], F, where) if "k" in keys else None,
        threshold=_threshold(named["threshold"], threshold_shape, settings, where) if "threshold" in keys else None,
        jump_threshold_F=finite_weights(named, "jump_threshold", 1, where) if "jump_threshold" in keys else None,
        norm=_activation_norm(named, M, D, where),
        settings=dict(settings),
    )


def _read_scaled(
    named: dict[str, Tensor], settings: Mapping[str, Any], where: str, activation_scale: Sequence[float] | None
) -> PublishedCrosscoder:
    _check_keys(named, SCALED_KEYS, SCALED_KEYS, where)
    W_dec_FMD = finite_weights(named, "W_dec", 3, where)
    F, M, D = W_dec_FMD.shape
    W_enc_MDF = finite_weights(named, "W_enc", 3, where)
    _check_shape("W_enc", W_enc_MDF, (M, D, F), "W_dec [F, M, D]", where)
    b_enc_F = finite_weights(named, "b_enc", 1, where)
    _check_shape("b_enc", b_enc_F, (F,), "W_dec [F, M, D]", where)
    b_dec_MD = finite_weights(named, "b_dec", 2, where)
    _check_shape("b_dec", b_dec_MD, (M, D), "W_dec [F, M, D]", where)
    _check_settings(settings, {"d_in": D, "dict_size": F}, where)
    norm = None
    if activation_scale is not None:
        norm = ActivationNorm(torch.zeros(M, D), _given_scale(activation_scale, M, where), target_rms=float(D) ** 0.5)
    return PublishedCrosscoder(
        W_enc_FMD=_copy(W_enc_MDF.permute(2, 0, 1)),
        b_enc_F=_copy(b_enc_F),
        W_dec_FMD=_copy(W_dec_FMD),
        b_dec_MD=_copy(b_dec_MD),
        norm=norm,
        is_scale_unknown=norm is None,
        settings=dict(settings),
    )


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy: the tensor read may be a memory map of the file, which others may change."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _check_keys(named: dict[str, Tensor], needed: Sequence[str], known: Sequence[str], where: str) -> None:
    missing = [key for key in needed if key not in named]
    if missing:
        raise InputError(
            f"a crosscoder's file holds {', '.join(needed)} (or {', '.join(SCALED_KEYS)}), but {', '.join(missing)} "
            f"is missing; came {sorted(named)[:12]} in {where}: give the crosscoder's own weights, not a trainer state"
        )
    unknown = sorted(key for key in named if key not in known)
    if unknown:
        raise InputError(
            f"the tensors {', '.join(known)} are understood, but {where} also holds {', '.join(unknown[:8])}, which "
            f"could change what the codes mean: save it again without them, or convert it"
        )


def finite_weights(named: Mapping[str, Tensor], key: str, num_dims: int, where: str) -> Tensor:
    """named[key] in float32; raises InputError unless it is floating point, finite and has num_dims filled axes."""
    tensor = named[key]
    if tensor.ndim != num_dims or 0 in tensor.shape or not tensor.is_floating_point():
        raise InputError(
            f"{key} must be a floating-point tensor with {num_dims} axes and no empty one, came {tensor.dtype} "
            f"{list(tensor.shape)} in {where}: the file is not a crosscoder of this layout"
        )
    weights = tensor.detach().to(torch.float32)
    if not bool(weights.isfinite().all()):
        num_bad = int((~weights.isfinite()).sum())
        raise InputError(
            f"{key} must be finite, came {num_bad} NaN or infinite numbers of {weights.numel()} in {where}: the run "
            f"that wrote it diverged or the file is damaged; take another checkpoint"
        )
    return weights


def _check_shape(key: str, tensor: Tensor, expected: tuple[int, ...], against: str, where: str) -> None:
    if tuple(tensor.shape) != expected:
        raise InputError(
            f"{key} must be {list(expected)} to agree with {against}, came {list(tensor.shape)} in {where}: M, D or F "
            f"disagree inside the file; take an undamaged copy"
        )


def _spread_encoder(W_enc_LDF: Tensor, M: int, settings: Mapping[str, Any], where: str) -> Tensor:
    """The encoder over all M models: models that it does not read (`encoder_layers`) get zero rows."""
    layers = settings.get("encoder_layers")
    if layers is None:
        return W_enc_LDF
    is_list = isinstance(layers, list) and all(0 <= layer < M for layer in layers)
    if not is_list or len(set(layers)) != len(layers) or len(layers) != W_enc_LDF.shape[0]:
        raise InputError(
            f"encoder_layers must list {W_enc_LDF.shape[0]} different models below {M} (encoder.weight's first axis "
            f"against decoder.weight's), came {short(layers)} in {where}: correct config.json"
        )
    W_enc_MDF = W_enc_LDF.new_zeros((M, *W_enc_LDF.shape[1:]))
    W_enc_MDF[layers] = W_enc_LDF
    return W_enc_MDF


def _check_settings(settings: Mapping[str, Any], expected: Mapping[str, int], where: str) -> None:
    for name, size in expected.items():
        came = settings.get(name)
        if came is not None and came != size:
            raise InputError(
                f"{name} in the settings must equal the tensors' {size}, came {short(came)} in {where}: settings and "
                f"weights are of two crosscoders; take both from one run"
            )
    if settings.get("latent_processor") is not None:
        raise InputError(
            f"latent_processor must be null, came {short(settings['latent_processor'])} in {where}: codes that a "
            f"function outside the file changes cannot be read"
        )


def _code_weight(named: dict[str, Tensor], settings: Mapping[str, Any], where: str) -> str:
    """From the tensor, else from the settings, else `crosscoder` (files older than the choice)."""
    by_tensor, by_settings = None, settings.get("code_normalization")
    if "code_normalization_id" in named:
        number = _scalar(named["code_normalization_id"], "code_normalization_id", where)
        if number != int(number) or not 1 <= number <= len(CODE_WEIGHTS):
            raise InputError(
                f"code_normalization_id must be 1 to {len(CODE_WEIGHTS)} ({', '.join(CODE_WEIGHTS)}), came {number:g} "
                f"in {where}: this version of crossray does not know that code weight"
            )
        by_tensor = CODE_WEIGHTS[int(number) - 1]
    if by_settings is not None:
        by_settings = str(by_settings).rsplit(".", 1)[-1].lower()  # "MIXED" and "CodeNormalization.MIXED" both occur
        if by_settings not in CODE_WEIGHTS or by_tensor not in (None, by_settings):
            raise InputError(
                f"code_normalization must be one of {', '.join(CODE_WEIGHTS)} and agree with code_normalization_id "
                f"({by_tensor}), came {short(settings['code_normalization'])} in {where}: correct config.json"
            )
    name = by_tensor or by_settings or "crosscoder"
    for key, alpha in MIXED_ALPHAS.items():
        if name == "mixed" and settings.get(key, alpha) != alpha:
            raise InputError(
                f"{key} must be {alpha} (the code weight `mixed` is sae + 0.1 crosscoder), came {short(settings[key])} "
                f"in {where}: another mix is not supported"
            )
    return name


def _sparsity(named: dict[str, Tensor], settings: Mapping[str, Any], where: str) -> type[Sparsity]:
    """From `dict_class`, else from the tensors that are there (files older than the setting)."""
    present = tuple(key for key in CODE_KEYS if key in named)
    trainer = settings.get("trainer")
    came = settings.get("dict_class") or (trainer.get("dict_class") if isinstance(trainer, dict) else None)
    name, known = came or (BatchTopK if present else L1).published_class, sparsity_by_class()
    if name not in known:
        raise InputError(
            f"dict_class must be one of {', '.join(known)}, came {short(came)} in {where}: this kind of dictionary "
            f"is not a crosscoder that crossray can read"
        )
    needed = known[name].published_tensors
    if present != needed:
        raise InputError(
            f"a {name} holds {' and '.join(needed) or 'only weights and biases'}, came "
            f"{' and '.join(present) or 'only weights and biases'} in {where}: settings and weights are of two "
            f"crosscoders, or the copy is incomplete; take both from one run"
        )
    return known[name]


def _number_of_active(tensor: Tensor, F: int, where: str) -> int:
    k = _scalar(tensor, "k", where)
    if k != int(k) or not 1 <= k <= F:
        raise InputError(f"k must be a whole number from 1 to F = {F}, came {k} in {where}: the file is damaged")
    return int(k)


def _threshold(tensor: Tensor, shape: tuple[int, ...], settings: Mapping[str, Any], where: str) -> Tensor:
    """float64; the published float32, or the number that crossray rounded to it."""
    if tensor.numel() != math.prod(shape) or not bool(tensor.isfinite().all()):
        raise InputError(
            f"threshold must hold {math.prod(shape)} finite number(s), one per model for the code weight decoupled, "
            f"came {tensor.flatten()[:4].tolist()} (shape {list(tensor.shape)}) in {where}: settings and "
            f"weights disagree"
        )
    published = tensor.detach().reshape(shape)
    kept = (settings.get(OWN_SETTINGS) or {}).get("threshold", torch.nan)
    numbers = kept if isinstance(kept, list) else [kept]
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers):
        raise InputError(f"threshold in crossray's settings must hold numbers, came {short(kept)} in {where}")
    exact = torch.tensor(kept, dtype=torch.float64)
    is_same = exact.shape == published.shape and torch.equal(exact.to(published.dtype), published)
    return exact if is_same else published.to(torch.float64)


def _activation_norm(named: dict[str, Tensor], M: int, D: int, where: str) -> ActivationNorm | None:
    """None unless mean and standard deviation are both there and free of NaN (NaN = trained without)."""
    present = [key for key in ("activation_mean", "activation_std") if key in named]
    if not present and "activation_global_scale" not in named:
        return None
    if len(present) < 2:
        came = (*present, "activation_global_scale")[0]
        raise InputError(
            f"activation_mean and activation_std come together, came {came} alone in {where}: take a whole copy"
        )
    mean_MD, std_MD = (_copy(named[key].detach().to(torch.float32)) for key in present)
    for key, tensor in zip(present, (mean_MD, std_MD), strict=True):
        _check_shape(key, tensor, (M, D), "decoder.weight [M, F, D]", where)
    if bool(mean_MD.isnan().any()) or bool(std_MD.isnan().any()):
        return None
    target_rms = _scalar(named["target_rms"], "target_rms", where) if "target_rms" in named else 1.0
    if target_rms <= 0 or not bool((std_MD >= 0).all()):
        raise InputError(
            f"target_rms must be above 0 and activation_std at least 0, came {target_rms:g} and a smallest deviation "
            f"of {float(std_MD.min()):g} in {where}: the activations' statistics in the file are damaged"
        )
    if "activation_global_scale" in named:
        scale_M = _copy(named["activation_global_scale"].detach().to(torch.float32))
        _check_shape("activation_global_scale", scale_M, (M,), "decoder.weight [M, F, D]", where)
    else:
        scale_M = (target_rms / (std_MD.double().square().sum(1) + NORM_EPSILON).sqrt()).to(torch.float32)
    if not bool((scale_M.isfinite() & (scale_M > 0)).all()) or not bool(mean_MD.isfinite().all()):
        raise InputError(
            f"the normalisation must have finite means and scales above 0, came scales {scale_M.tolist()} in {where}: "
            f"the activations' statistics in the file are damaged"
        )
    return ActivationNorm(mean_MD, scale_M, std_MD, target_rms)


def _given_scale(activation_scale: Sequence[float], M: int, where: str) -> Tensor:
    scale_M = torch.tensor([float(scale) for scale in activation_scale], dtype=torch.float32)
    if len(scale_M) != M or not bool((scale_M.isfinite() & (scale_M > 0)).all()):
        raise InputError(
            f"activation_scale must hold {M} finite numbers above 0, one per model (sqrt(D) / mean |x|), came "
            f"{list(activation_scale)} for {where}"
        )
    return scale_M


def _scalar(tensor: Tensor, key: str, where: str) -> float:
    if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
        raise InputError(
            f"{key} must be one finite number, came {tensor.flatten()[:4].tolist()} (shape {list(tensor.shape)}) in "
            f"{where}: the file is damaged"
        )
    return float(tensor.item())
