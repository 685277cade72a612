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
from pipeline.schema import BASE, CHAT, Ownership

Kind = Literal[
    "none",
    "template",
    "chat",
    "base",
    "first",
    "template_and_first",
    "mean_difference",
    "mean_difference_projection",
    "principal_1",
    "principal_all",
    "all",
    "error",
    "replace",
    "add",
]
MEAN_DIFFERENCE_KINDS: tuple[Kind, ...] = ("mean_difference", "mean_difference_projection")
"""Edits along the mean of x^chat - x^base: the baseline that a crosscoder must beat (arXiv 2510.13900)."""
PRINCIPAL_KINDS: tuple[Kind, ...] = ("principal_1", "principal_all")
"""Projections of the difference on the directions in which it varies most."""
FIRST_KINDS: tuple[Kind, ...] = ("first", "template_and_first")
"""The chat model's stream at the positions that predict the first tokens of each answer."""
BASELINE_KINDS = (*MEAN_DIFFERENCE_KINDS, *PRINCIPAL_KINDS)
SHARED_KINDS: tuple[Kind, ...] = ("none", "template", "chat", "base", *FIRST_KINDS, *BASELINE_KINDS)
"""Kinds that need no crosscoder: their KL is the same for every crosscoder of a pair."""

NU_ACT_LIMITS = (0.1, 0.3, 0.6)
DELTA_NORM_LIMIT = 0.7
"""Limits of the paper's threshold sets; its decoder norm difference of 0.3 is 1 - Delta_norm."""

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


class Baselines(NamedTuple):
    """What the interventions without a crosscoder need beside the rows; what is None or 0 leaves its own out."""

    mean_difference_D: Tensor | None = None
    """Mean of x^chat - x^base."""
    principal_KD: Tensor | None = None
    """Orthonormal principal directions of x^chat - x^base, the one of largest variance first."""
    num_first: int = 0
    """Predicting positions of each answer that FIRST_KINDS patch."""


NO_BASELINES = Baselines()


class SharedInputs(NamedTuple):
    """What the interventions without a crosscoder read, N rows."""

    x_NMD: Tensor
    is_template_N: Tensor
    has_codes_N: Tensor
    """bool: rows of the kind that crosscoders are trained on; along directions only these are edited."""
    is_first_N: Tensor
    """bool: the first predicting positions of each answer."""
    baselines: Baselines = NO_BASELINES


def shared_interventions(baselines: Baselines = NO_BASELINES) -> tuple[Intervention, ...]:
    """The interventions that need no crosscoder."""
    left_out: set[Kind] = set()
    left_out |= set(MEAN_DIFFERENCE_KINDS) if baselines.mean_difference_D is None else set()
    left_out |= set(PRINCIPAL_KINDS) if baselines.principal_KD is None else set()
    left_out |= set(FIRST_KINDS) if not baselines.num_first else set()
    return tuple(Intervention(kind, kind) for kind in SHARED_KINDS if kind not in left_out)


def plan_interventions(
    chosen: pd.DataFrame,
    *,
    num_random_halves: int = 2,
    seed: int = 0,
    baselines: Baselines = NO_BASELINES,
    with_whole: bool = True,
) -> tuple[Intervention, ...]:
    """Every intervention on the chosen latents (`causality_latents`), shared ones included, in table order.

    Halves have floor(N / 2) latents each of the N chosen ones; the middle one of an odd number is in neither. They are
    empty where fewer than two latents qualify, and then equal `none`. with_whole=False leaves out `all` and `error`: a
    SAE of the chat model reconstructs its whole stream, not what it has beyond the base model's.
    """
    plan = [*shared_interventions(baselines)]
    if with_whole:
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


def further_interventions(
    latents: pd.DataFrame, chosen: pd.DataFrame, sets: Sequence[str], *, thresholds: tuple[float, float] = (0.2, 0.5)
) -> tuple[Intervention, ...]:
    """Interventions on further sets of a latent table's live latents, by the names of CausalitySection.further_sets.

    thresholds: added latents with |nu_act| <= 0.1, 0.3, 0.6, those above 0.6, those with Delta_norm >= 0.7 (the limits
    of the paper's code), and the chat-only ones with both deciding ratios below their thresholds, and the others.
    base_only: the base-only latents replaced, alone and together with the best and the worst half.
    """
    live = latents[latents["frequency"] > 0]
    is_chat_only, size = live["ownership"] == Ownership.CHAT_ONLY, live["nu_act"].abs()
    plan = []
    if "thresholds" in sets:
        nu_eps, nu_r = thresholds
        is_below = (live["nu_eps"].abs() < nu_eps) & (live["nu_r"].abs() < nu_r)
        members = {f"nu_act_below_{limit:g}_add": size <= limit for limit in NU_ACT_LIMITS}
        members |= {f"nu_act_above_{NU_ACT_LIMITS[-1]:g}_add": size > NU_ACT_LIMITS[-1]}
        members |= {f"delta_norm_above_{DELTA_NORM_LIMIT:g}_add": live["delta_norm"] >= DELTA_NORM_LIMIT}
        members |= {"both_ratios_below_add": is_chat_only & is_below, "a_ratio_above_add": is_chat_only & ~is_below}
        plan += [_on_set(name, "add", live.loc[where, "latent"].to_numpy()) for name, where in members.items()]
    if "base_only" in sets:
        base_only = live.loc[live["ownership"] == Ownership.BASE_ONLY, "latent"].to_numpy()
        order, half = rank_by_nu(chosen), len(chosen) // 2
        parts = {"base_only": order[:0], "best_half_base_only": order[:half]}
        parts["worst_half_base_only"] = order[len(order) - half :]
        plan += [_on_set(f"{name}_replace", "replace", np.concatenate([own, base_only])) for name, own in parts.items()]
    return tuple(plan)


def principal_directions(difference_ND: Tensor, number: int, *, seed: int) -> Tensor | None:
    """The `number` orthonormal directions [K, D] in which rows vary most, the first of most variance; None for 0.

    Fewer where there are not as many rows or dimensions. By a randomised singular value decomposition of the centred
    rows with a fixed seed; a direction's sign means nothing.
    """
    number = min(number, *difference_ND.shape)
    if number == 0:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = min(2 * number + 10, *difference_ND.shape)
        principal_DK: Tensor = torch.pca_lowrank(difference_ND, q=size, niter=6)[2]
    return principal_DK[:, :number].T.contiguous()


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
    """h' [N, D] of the kinds that need no crosscoder, with m the mean difference and V the principal directions:

    none x^base; template x^base, but x^chat on template tokens; first x^base, but x^chat at the first predicting
    positions of each answer; template_and_first both; chat x^chat; base x^base; mean_difference x^base + m;
    mean_difference_projection x^base + <x^chat - x^base, m> m / |m|^2, the best that this one direction can do;
    principal_1 and principal_all x^base + V^T V (x^chat - x^base) with the first one or all of V.
    """
    assert kind in SHARED_KINDS
    base_ND, chat_ND = inputs.x_NMD[:, BASE], inputs.x_NMD[:, CHAT]
    patched = {
        "template": inputs.is_template_N,
        "first": inputs.is_first_N,
        "template_and_first": inputs.is_template_N | inputs.is_first_N,
    }
    if kind in patched:
        return torch.where(patched[kind][:, None], chat_ND, base_ND)
    if kind not in BASELINE_KINDS:
        return chat_ND if kind == "chat" else base_ND
    return torch.where(inputs.has_codes_N[:, None], base_ND + _along_directions(kind, inputs), base_ND)


def _along_directions(kind: Kind, inputs: SharedInputs) -> Tensor:
    """What BASELINE_KINDS add to the base stream, [N, D]."""
    difference_ND = inputs.x_NMD[:, CHAT] - inputs.x_NMD[:, BASE]
    if kind in PRINCIPAL_KINDS:
        assert inputs.baselines.principal_KD is not None
        principal_KD = inputs.baselines.principal_KD.to(difference_ND)[: 1 if kind == "principal_1" else None]
        return difference_ND @ principal_KD.T @ principal_KD
    assert inputs.baselines.mean_difference_D is not None
    mean_D = inputs.baselines.mean_difference_D.to(difference_ND)
    if kind == "mean_difference":
        return mean_D.expand_as(difference_ND)
    squared_norm = (mean_D @ mean_D).clamp_min(torch.finfo(mean_D.dtype).tiny)  # a mean of 0 adds 0
    return (difference_ND @ mean_D / squared_norm)[:, None] * mean_D


def _on_set(name: str, kind: str, members: Sequence[int] | np.ndarray) -> Intervention:
    assert kind in ("replace", "add")
    return Intervention(name, "add" if kind == "add" else "replace", tuple(sorted(int(j) for j in members)))
