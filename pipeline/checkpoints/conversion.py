"""Between files and the module: what `Crosscoder.from_pretrained`, `save_pretrained` and `push_to_hub` do.

numerics calls in here only when one of these methods is called, so that the mathematics needs torch alone. Nothing is
decided here that concerns bytes (published.py, export.py) or codes (numerics/crosscoder.py); a file's fields become the
module's fields, one to one. Optimiser and schedules are no part of it: a training run resumes from its own checkpoint.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.export import push_published, write_published
from pipeline.checkpoints.layouts import (
    BATCH_TOPK_CLASS,
    JUMPRELU_CLASS,
    RELU_CLASS,
    TOPK_CLASS,
    ActivationNorm,
    PublishedCrosscoder,
)
from pipeline.checkpoints.published import read_published
from pipeline.numerics.crosscoder import Crosscoder, Normalisation

logger = logging.getLogger(__name__)

CLASS_OF_ACTIVATION = {
    "relu": RELU_CLASS,
    "batch_topk": BATCH_TOPK_CLASS,
    "topk": TOPK_CLASS,
    "jumprelu": JUMPRELU_CLASS,
}
"""The module's name for how codes are made sparse, and the published name."""


def load_crosscoder(source: str | Path, **options: Any) -> Crosscoder:
    """The crosscoder at a folder, a weights file or a hub id, on the CPU in float32.

    Options are those of `published.read_published`: revision, subfolder, activation_scale. Raises InputError; warns
    where the activations' scale is unknown.
    """
    checkpoint = read_published(source, **options)
    if checkpoint.is_scale_unknown:
        logger.warning(
            "%s was trained on activations scaled to mean norm sqrt(D) = %.1f per model, and the scales are not in the "
            "file: give it activations scaled so, or pass activation_scale=(sqrt(D) / mean |x| of each model)",
            source,
            checkpoint.activation_dim**0.5,
        )
    return from_checkpoint(checkpoint)


def save_crosscoder(crosscoder: Crosscoder, folder: str | Path, *, trainer: Mapping[str, Any] | None = None) -> None:
    """Writes the published layout into `folder`, each file atomically; float32, whatever the module's dtype.

    Loaded again, a float32 crosscoder is the same to the last bit, its threshold included.
    """
    write_published(folder, to_checkpoint(crosscoder), trainer=trainer)


def push_crosscoder(crosscoder: Crosscoder, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads what save_crosscoder writes to the hub; returns the commit's address."""
    with tempfile.TemporaryDirectory() as folder:
        save_crosscoder(crosscoder, folder)
        return push_published(repo_id, folder, private=private, revision=revision)


def from_checkpoint(checkpoint: PublishedCrosscoder) -> Crosscoder:
    """The module for a checkpoint; shares its weights' memory."""
    activation = next(name for name, published in CLASS_OF_ACTIVATION.items() if published == checkpoint.dict_class)
    crosscoder = Crosscoder(
        checkpoint.num_latents,
        checkpoint.num_models,
        checkpoint.activation_dim,
        activation=activation,
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


def to_checkpoint(crosscoder: Crosscoder) -> PublishedCrosscoder:
    """What of a module goes into a file."""
    norm = None
    if crosscoder.normalisation is not None:
        mean_MD, scale_M = (tensor.detach().float().cpu() for tensor in crosscoder.normalisation)
        norm = ActivationNorm(mean_MD, scale_M)
    return PublishedCrosscoder(
        **{
            name: getattr(crosscoder, name).detach().to("cpu", torch.float32)
            for name in ("W_enc_FMD", "b_enc_F", "W_dec_FMD", "b_dec_MD")
        },
        code_weight=crosscoder.code_weight,
        dict_class=CLASS_OF_ACTIVATION[crosscoder.activation],
        k=crosscoder.k if crosscoder.activation in ("batch_topk", "topk") else None,
        threshold=crosscoder.threshold.detach().cpu() if crosscoder.activation == "batch_topk" else None,
        jump_threshold_F=crosscoder.jump_threshold_F.float().cpu() if crosscoder.activation == "jumprelu" else None,
        norm=norm,
    )
