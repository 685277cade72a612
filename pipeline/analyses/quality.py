"""Whether a fitted crosscoder is good enough for a verdict: what is missing, in place of an answer.

A dictionary that explains a third of the activations finds nothing new because it finds nothing. Its verdict would be
told with the same certainty as that of a good one, so it is withheld, and the reasons stand in its place.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Limits(NamedTuple):
    """What a verdict needs; docs/method.md says why these numbers."""

    min_fve: float = 0.5
    """Fraction of variance explained in each model (of the difference, for a difference SAE), attention sinks aside."""
    max_dead_frac: float = 0.95
    min_rows_per_latent: float = 50.0
    """Training rows divided by latents."""
    min_documents: int = 50
    """Validation documents."""


def shortcomings(
    fidelity: Mapping[str, float],
    *,
    num_latents: int,
    num_training_rows: int | None,
    num_documents: int,
    limits: Limits,
) -> tuple[str, ...]:
    """What is missing, one phrase each with the number that was found and the one that is wanted; () for nothing.

    fidelity has the numbers of schema.FIDELITY_KEYS. num_training_rows is None where nobody knows, as for a crosscoder
    from elsewhere. num_documents are those of the validation rows.
    """
    found = []
    for name, what in _explained(fidelity).items():
        if not what >= limits.min_fve:
            found.append(f"it explains {what:.2f} of the variance of {name} (at least {limits.min_fve:g} is wanted)")
    if fidelity["dead_frac"] > limits.max_dead_frac:
        found.append(f"{fidelity['dead_frac']:.0%} of its latents are dead (at most {limits.max_dead_frac:.0%})")
    if num_training_rows is not None and num_training_rows < limits.min_rows_per_latent * num_latents:
        found.append(
            f"it was trained on {num_training_rows:,} rows, {num_training_rows / num_latents:.1f} for each of its "
            f"{num_latents:,} latents (at least {limits.min_rows_per_latent:g})"
        )
    if num_documents < limits.min_documents:
        found.append(f"it was judged on {num_documents:,} documents (at least {limits.min_documents:,})")
    return tuple(found)


def _explained(fidelity: Mapping[str, float]) -> dict[str, float]:
    """FVE by what is explained. Sinks hide what the pooled number without them shows."""
    if math.isnan(fidelity["fve_chat"]):
        return {"the difference": fidelity["fve_without_sinks"]}
    if math.isnan(fidelity["fve_base"]) and fidelity["fve"] == fidelity["fve_chat"]:  # a SAE of the chat model
        return {"the chat model": fidelity["fve_without_sinks"]}
    explained = {"the base model": fidelity["fve_base"], "the chat model": fidelity["fve_chat"]}
    if fidelity["num_sinks"]:
        explained["the rows that are no attention sinks"] = fidelity["fve_without_sinks"]
    return explained
