"""The sparsities that exist: the one place where a new one is listed, and the ways to find one."""

from pipeline.numerics.settings import check_choice
from pipeline.numerics.sparsities.base import Sparsity
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.delta import Delta
from pipeline.numerics.sparsities.jumprelu import JumpRelu
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.sparsities.matryoshka import Matryoshka
from pipeline.numerics.sparsities.shared_l1 import SharedL1
from pipeline.numerics.sparsities.topk import TopK

SPARSITIES: dict[str, type[Sparsity]] = {
    one.kind: one for one in (L1, BatchTopK, TopK, JumpRelu, Matryoshka, SharedL1, Delta)
}
"""By kind, the name in run files. Of those that files cannot tell apart, the first is the one that reads them."""


def sparsity_of_activation(activation: str) -> type[Sparsity]:
    """The sparsity behind Crosscoder(activation=...); raises ValueError that names those that exist."""
    by_activation = _first_by("activation")
    check_choice("activation", activation, tuple(by_activation))
    return by_activation[activation]


def sparsity_by_class() -> dict[str, type[Sparsity]]:
    """All sparsities by their `dict_class` in the published layout."""
    return _first_by("published_class")


def _first_by(name: str) -> dict[str, type[Sparsity]]:
    found: dict[str, type[Sparsity]] = {}
    for one in SPARSITIES.values():
        found.setdefault(getattr(one, name), one)
    return found
