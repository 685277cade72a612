"""A crosscoder small enough to train dozens of times in a test, and rows for it."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.registry import SPARSITIES
from pipeline.numerics.spec import CrosscoderSpec

M, D, F, B = 2, 8, 32, 24
_SPARSITY_FIELDS = {field.name for one in SPARSITIES.values() for field in dataclasses.fields(one)}


def changed(spec: CrosscoderSpec, *, kind: str | None = None, **changes: Any) -> CrosscoderSpec:
    """The spec with other fields, its own or its sparsity's; of another kind, where `kind` is given.

    Fields that a sparsity does not have are left out, so that one call serves all kinds.
    """
    sparsity = SPARSITIES[kind or spec.sparsity.kind]
    names = {field.name for field in dataclasses.fields(sparsity)}
    before = {name: value for name, value in dataclasses.asdict(spec.sparsity).items() if name in names}
    own = {name: changes.pop(name) for name in _SPARSITY_FIELDS & changes.keys()}
    own = {name: value for name, value in own.items() if name in names}
    return dataclasses.replace(spec, sparsity=sparsity(**(before | own)), **changes)


def make_spec(**changes: Any) -> CrosscoderSpec:
    """BatchTopK whose warm-up, threshold and decay all happen within a few steps."""
    spec = CrosscoderSpec(
        num_models=M,
        activation_dim=D,
        num_latents=F,
        num_steps=40,
        sparsity=BatchTopK(k=3, threshold_start_step=5, threshold_decay=0.5),
        lr=1e-2,
        lr_warmup_steps=5,
        init_norm=1.0,
        clip_norm=1.0,
    )
    return changed(spec, **changes)


def rows(seed: int, num_rows: int = B) -> Tensor:
    """x_BMD of independent normal numbers."""
    return torch.randn(num_rows, M, D, generator=torch.Generator().manual_seed(seed))
