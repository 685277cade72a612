"""The sparsities that exist: the one place where a new one is listed, and the ways to find one."""

from pipeline.numerics.settings import check_choice
from pipeline.numerics.sparsities.base import Sparsity
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.jumprelu import JumpRelu
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.sparsities.topk import TopK

SPARSITIES: dict[str, type[Sparsity]] = {one.kind: one for one in (L1, BatchTopK, TopK, JumpRelu)}
"""By kind, the name in run files."""


def sparsity_of_activation(activation: str) -> type[Sparsity]:
    """The sparsity behind Crosscoder(activation=...); raises ValueError that names those that exist."""
    by_activation = {one.activation: one for one in SPARSITIES.values()}
    check_choice("activation", activation, tuple(by_activation))
    return by_activation[activation]


def sparsity_by_class() -> dict[str, type[Sparsity]]:
    """All sparsities by their `dict_class` in the published layout."""
    return {one.published_class: one for one in SPARSITIES.values()}
