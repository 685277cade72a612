"""Inputs of steering: prompts with the markers of a behaviour, and latents as directions.

Prompts come as parsed JSON, from the organism or from a user's file; for a file without behaviours only KL, fluency and
the answers are reported. latent_sets.py chooses latents. Nothing here runs a model.

Shapes: D width, R random controls.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.latent_sets import require_latents
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import CHAT

UNNAMED = "prompts"
"""Column `behavior` of a file that is a plain list of prompts."""


class Direction(NamedTuple):
    """A latent as a steering direction."""

    latent: int
    unit_D: Tensor
    """d_j^chat / |d_j^chat| in raw activation space, float32."""
    max_contribution: float
    """Largest f_j |d_j^chat| on the validation rows, in raw activation space: the norm that is added at scale 1."""


class BehaviorPrompts(NamedTuple):
    """Prompts that do not call for a behaviour, and the markers by which it is recognised."""

    behavior: str
    prompts: tuple[str, ...]
    """User messages."""
    markers: tuple[str, ...]
    """An answer that contains one of these substrings shows the behaviour; empty: no behaviour is looked for."""


def directions_of(crosscoder: Crosscoder, latents: pd.DataFrame, chosen: Sequence[int]) -> tuple[Direction, ...]:
    """Chosen latents as directions; `latents` is the latent table (columns latent, max_activation).

    InputError for a latent that does not exist, never fires, or has no chat decoder.
    """
    max_activation = dict(zip(latents["latent"].tolist(), latents["max_activation"].tolist(), strict=True))
    decoder_FD = crosscoder.raw_decoder_FMD()[:, CHAT]
    require_latents(chosen, crosscoder.num_latents, "analyses.steering.latents")
    directions = []
    for latent in chosen:
        norm = float(decoder_FD[latent].norm())
        if not max_activation[latent] > 0 or not norm > 0:
            raise InputError(
                f"expected a latent that fires and has a chat decoder, latent {latent} has maximal activation "
                f"{max_activation[latent]} and decoder norm {norm}; steer with another latent"
            )
        unit_D = (decoder_FD[latent] / norm).float().cpu()
        directions.append(Direction(int(latent), unit_D, norm * float(max_activation[latent])))
    return tuple(directions)


def random_controls(
    crosscoder: Crosscoder, latents: pd.DataFrame, *, excluded: Sequence[int], num: int, seed: int
) -> Tensor:
    """Unit chat decoder directions [R, D], float32, of `num` random latents that fire (fewer where there are fewer).

    Other latents are a fairer control than random directions, which leave the space that the model uses. `excluded` are
    the latents under test. Equal seeds give equal controls.
    """
    decoder_FD = crosscoder.raw_decoder_FMD()[:, CHAT].float().cpu()
    fires = latents.loc[latents["max_activation"] > 0, "latent"].to_numpy()
    others = np.setdiff1d(fires, np.asarray(list(excluded), dtype=fires.dtype))
    others = others[decoder_FD[torch.from_numpy(others).long()].norm(dim=1).numpy() > 0]
    chosen = np.random.default_rng(seed).permutation(others)[:num]
    chosen_RD = decoder_FD[torch.from_numpy(chosen).long()]
    units_RD: Tensor = chosen_RD / chosen_RD.norm(dim=1, keepdim=True)
    return units_RD


def parse_prompts(prompts: Any, *, num_prompts: int, source: str) -> tuple[BehaviorPrompts, ...]:
    """Behaviours of a parsed prompts file, the first num_prompts prompts of each.

    Either {behavior: {"neutral": [...], "markers": [...]}}, where markers may be left out, or a plain list of prompts.
    """
    if isinstance(prompts, list) and prompts:
        return (BehaviorPrompts(UNNAMED, _texts(prompts, source, "the list")[:num_prompts], ()),)
    if not isinstance(prompts, Mapping) or not prompts:
        raise InputError(
            f"{source}: expected {{behavior: {{neutral, markers}}}} or a list of prompts, got {str(prompts)[:60]!r}"
        )
    parsed = []
    for behavior, entry in prompts.items():
        read = entry if isinstance(entry, Mapping) else {}
        neutral = _texts(read.get("neutral"), source, f"{behavior}.neutral")[:num_prompts]
        markers = _texts(read["markers"], source, f"{behavior}.markers") if "markers" in read else ()
        parsed.append(BehaviorPrompts(str(behavior), neutral, markers))
    return tuple(parsed)


def _texts(value: Any, source: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise InputError(f"{source}: expected a list of texts under {where}, got {str(value)[:60]!r}; add them")
    return tuple(value)
