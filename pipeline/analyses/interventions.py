"""Edits of the residual stream at layer L: which latents are put in or taken out, and how.

Each intervention turns the base or chat stream into h', on which the chat model's upper half continues
(arXiv 2504.02922, section 4; formulas in the docstrings of `edited_stream` and `shared_stream`). Sets come from
latent_sets.py. Nothing here runs a model or measures anything.

Rows without codes (positions that the crosscoder was not trained on) stay unedited.

Shapes: N rows, M models, D width, F latents.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.latent_sets import rank_by_delta_norm, rank_by_nu
from pipeline.errors import InputError
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT

Kind = Literal[
    "none",
    "template",
    "chat",
    "base",
    "mean_difference",
    "mean_difference_projection",
    "all",
    "error",
    "replace",
    "add",
]
MEAN_DIFFERENCE_KINDS: tuple[Kind, ...] = ("mean_difference", "mean_difference_projection")
"""Edits along the mean of x^chat - x^base: the baseline that a crosscoder must beat (arXiv 2510.13900)."""
SHARED_KINDS: tuple[Kind, ...] = ("none", "template", "chat", "base", *MEAN_DIFFERENCE_KINDS)
"""Kinds that need no crosscoder: their KL is the same for every crosscoder of a pair."""

BY_EVIDENCE = "evidence"
"""Order of a curve that adds latents from most to least chat-specific; the others are `random_0`, `random_1`, ..."""


class Intervention(NamedTuple):
    """One edit, by name."""

    name: str
    """As in the column `intervention`."""
    kind: Kind
    latents: tuple[int, ...] = ()
    """The set S of kinds replace and add, ascending."""
    order: str = ""
    """For a point of a curve: the order in which latents are added (BY_EVIDENCE or random_<i>); else empty."""


class SharedInputs(NamedTuple):
    """What the interventions without a crosscoder read, N rows."""

    x_NMD: Tensor
    is_template_N: Tensor
    has_codes_N: Tensor
    """bool: rows of the kind that crosscoders are trained on; along the mean difference only these are edited."""
    mean_difference_D: Tensor | None = None
    """Mean of x^chat - x^base; None leaves its interventions out."""


def shared_interventions(*, with_mean_difference: bool = False) -> tuple[Intervention, ...]:
    """The interventions that need no crosscoder."""
    kinds = [kind for kind in SHARED_KINDS if with_mean_difference or kind not in MEAN_DIFFERENCE_KINDS]
    return tuple(Intervention(kind, kind) for kind in kinds)


def plan_interventions(
    chosen: pd.DataFrame, *, num_random_halves: int = 2, seed: int = 0, with_mean_difference: bool = False
) -> tuple[Intervention, ...]:
    """Every intervention on the chosen latents (`causality_latents`), shared ones included, in table order.

    Halves have floor(N / 2) latents each of the N chosen ones; the middle one of an odd number is in neither. They are
    empty where fewer than two latents qualify, and then equal `none`.
    """
    plan = [*shared_interventions(with_mean_difference=with_mean_difference)]
    plan += [Intervention("all", "all"), Intervention("error", "error")]
    for suffix, order in (("", rank_by_nu(chosen)), ("_by_delta_norm", rank_by_delta_norm(chosen))):
        half = len(order) // 2
        halves = {"best": order[:half], "worst": order[len(order) - half :]}
        for kind in ("replace", "add"):
            plan += [_on_set(f"{name}_half_{kind}{suffix}", kind, members) for name, members in halves.items()]
    generator = np.random.default_rng(seed)
    latents = np.sort(chosen["latent"].to_numpy())
    for number in range(num_random_halves):
        members = generator.permutation(latents)[: len(latents) // 2]
        plan += [_on_set(f"random_half_{number}_{kind}", kind, members) for kind in ("replace", "add")]
    return tuple(plan)


def plan_curve(chosen: pd.DataFrame, *, num_random_orders: int = 1, seed: int = 0) -> tuple[Intervention, ...]:
    """Kind replace on the first n = 0, 1, 2, 4, ..., N of the chosen latents, by evidence and in random orders.

    n = 0 equals `none`; the N-th point is the same set in every order, so it costs nothing more.
    """
    by_evidence = rank_by_nu(chosen)
    generator = np.random.default_rng((seed, 1))  # orders that do not depend on how many random halves are drawn
    orders = {BY_EVIDENCE: by_evidence}
    orders |= {f"random_{i}": generator.permutation(np.sort(by_evidence)) for i in range(num_random_orders)}
    return tuple(
        _on_set(f"first_{size}_{name}", "replace", order[:size])._replace(order=name)
        for name, order in orders.items()
        for size in curve_sizes(len(order))
    )


def curve_sizes(num_latents: int) -> list[int]:
    """0, 1, 2, 4, ... up to the number of latents, which is always the last."""
    powers = [1 << i for i in range(num_latents.bit_length()) if 1 << i < num_latents]
    return [0, *powers, num_latents] if num_latents else [0]


class StreamEditor:
    """h' of one crosscoder's interventions; holds the decoder in units of raw activations."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        if crosscoder.num_models != 2:
            raise InputError(
                f"expected a crosscoder over one base and one chat model, got one over {crosscoder.num_models} "
                "activations; causality needs a pair"
            )
        self.crosscoder = crosscoder
        decoder_FMD = crosscoder.raw_decoder_FMD()
        self._base_FD = decoder_FMD[:, BASE].contiguous()
        self._chat_FD = decoder_FMD[:, CHAT].contiguous()
        self._delta_FD = self._chat_FD - self._base_FD

    def edited_stream(self, intervention: Intervention, x_NMD: Tensor, codes: SparseCodes) -> Tensor:
        """h' [N, D], float32, with f the codes and delta_j = d_j^chat - d_j^base:

        all x^base + sum_j f_j delta_j; error x^chat - sum_j f_j delta_j;
        replace x^base + sum_{j in S} f_j delta_j; add x^base + sum_{j in S} f_j d_j^chat.
        The kinds that need no crosscoder are those of `shared_stream`.
        """
        assert intervention.kind not in SHARED_KINDS, intervention.kind
        base_ND, chat_ND = x_NMD[:, BASE], x_NMD[:, CHAT]
        if intervention.kind == "all":
            return base_ND + self._difference(codes)
        if intervention.kind == "error":
            return chat_ND - self._difference(codes)
        in_set_F = torch.zeros(codes.num_latents, dtype=torch.bool, device=codes.latents_P.device)
        in_set_F[list(intervention.latents)] = True
        kept = codes.keep(in_set_F[codes.latents_P])
        if intervention.kind == "replace":
            return base_ND + self._difference(kept)
        return base_ND + self._decode(kept, CHAT, self._chat_FD)

    def _difference(self, codes: SparseCodes) -> Tensor:
        """sum_j f_j delta_j; with the decoupled code weight each model has its own f_j."""
        if codes.model_mask_PM is None:
            return self.crosscoder.kernels.decode(codes, self._delta_FD)
        return self._decode(codes, CHAT, self._chat_FD) - self._decode(codes, BASE, self._base_FD)

    def _decode(self, codes: SparseCodes, model: int, direction_FD: Tensor) -> Tensor:
        if codes.model_mask_PM is not None:
            codes = codes.keep(codes.model_mask_PM[:, model])._replace(model_mask_PM=None)
        return self.crosscoder.kernels.decode(codes, direction_FD)


def shared_stream(kind: Kind, inputs: SharedInputs) -> Tensor:
    """h' [N, D] of the kinds that need no crosscoder, with m the mean difference:

    none x^base; template x^base, but x^chat on template tokens; chat x^chat; base x^base; mean_difference x^base + m;
    mean_difference_projection x^base + <x^chat - x^base, m> m / |m|^2, the best that this one direction can do.
    """
    assert kind in SHARED_KINDS
    base_ND, chat_ND = inputs.x_NMD[:, BASE], inputs.x_NMD[:, CHAT]
    if kind == "template":
        return torch.where(inputs.is_template_N[:, None], chat_ND, base_ND)
    if kind not in MEAN_DIFFERENCE_KINDS:
        return chat_ND if kind == "chat" else base_ND
    assert inputs.mean_difference_D is not None
    mean_D = inputs.mean_difference_D.to(base_ND)
    added_ND = mean_D.expand_as(base_ND)
    if kind == "mean_difference_projection":
        squared_norm = (mean_D @ mean_D).clamp_min(torch.finfo(mean_D.dtype).tiny)  # a mean of 0 adds 0
        added_ND = ((chat_ND - base_ND) @ mean_D / squared_norm)[:, None] * mean_D
    return torch.where(inputs.has_codes_N[:, None], base_ND + added_ND, base_ND)


def _on_set(name: str, kind: str, members: Sequence[int] | np.ndarray) -> Intervention:
    assert kind in ("replace", "add")
    return Intervention(name, "add" if kind == "add" else "replace", tuple(sorted(int(j) for j in members)))
