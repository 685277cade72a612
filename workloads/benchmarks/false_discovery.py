"""The false discovery rate that the verdict states against the share that is really false, on simulated latents.

    python -m workloads.benchmarks.false_discovery

Every latent has a true ratio nu_eps, drawn from a prior; each document adds to its base and chat sums with a weight of
its own and a ratio that scatters around the true one. The verdict's own p-values and Benjamini-Hochberg call latents
new at a rate of 0.05, and a call is false where the true ratio is at or beyond the limit. Beside it stands what one
would call by the ratio alone (the rule `paper`). It takes minutes on one core; the table is in docs/how-right.md.

Shapes: G documents, F latents.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.significance import p_absent, q_values
from pipeline.numerics.statistics import student_t_quantile

LIMIT = 0.2
"""The verdict's threshold of nu_eps."""
RATE = 0.05
"""The stated false discovery rate."""
SPREAD = 0.3
"""Standard deviation of a document's ratio around the true one."""


def near_a_limit(number: int, generator: torch.Generator) -> Tensor:
    """Nine of ten true ratios near 0.3, the others near 0."""
    is_new = torch.rand(number, generator=generator) < 0.1
    near = 0.3 + 0.03 * torch.randn(number, generator=generator)
    return torch.where(is_new, 0.03 * torch.randn(number, generator=generator), near).double()


def at_the_limit(number: int, generator: torch.Generator) -> Tensor:
    """Half exactly at the limit, the hardest null, half at 0."""
    return torch.where(torch.rand(number, generator=generator) < 0.5, LIMIT, 0.0).double()


def of_every_strength(number: int, generator: torch.Generator) -> Tensor:
    """Even between 0 and 0.8."""
    return 0.8 * torch.rand(number, generator=generator).double()


def new_or_shared(number: int, generator: torch.Generator) -> Tensor:
    """Half near 0, half at 0.9."""
    return torch.where(torch.rand(number, generator=generator) < 0.5, 0.02, 0.9).double()


def nothing_new(number: int, generator: torch.Generator) -> Tensor:
    """All between 0.2 and 1.2: every call is false."""
    return 0.2 + torch.rand(number, generator=generator).double()


PRIORS: tuple[Callable[[int, torch.Generator], Tensor], ...] = (
    near_a_limit,
    at_the_limit,
    of_every_strength,
    new_or_shared,
    nothing_new,
)


def document_sums(nu_F: Tensor, *, documents: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Base and chat sums [G, F], float64, of documents of unequal weight, whose ratios scatter around nu_F."""
    generator = torch.Generator().manual_seed(seed)
    size = (documents, len(nu_F))
    chat_GF = torch.exp(0.5 * torch.randn(size, dtype=torch.float64, generator=generator))
    return chat_GF * (nu_F + spread * torch.randn(size, dtype=torch.float64, generator=generator)), chat_GF


class Outcome(NamedTuple):
    """One simulated run."""

    false_share: float
    """Share of the called latents that are false; 0 where none is called."""
    found: float
    """Share of the new latents that are called; NaN where none is new."""
    false_share_by_ratio: float
    """The same share where the ratio alone decides."""


def simulate(
    prior: Callable[[int, torch.Generator], Tensor], *, documents: int, latents: int, seed: int, spread: float = SPREAD
) -> Outcome:
    """One draw of true ratios and documents."""
    nu_F = prior(latents, torch.Generator().manual_seed(seed))
    base_GF, chat_GF = document_sums(nu_F, documents=documents, spread=spread, seed=1000 * documents + seed)
    is_called_F = q_values(p_absent([(base_GF, chat_GF, LIMIT)])) <= RATE
    is_below_F = base_GF.sum(0) / chat_GF.sum(0) < LIMIT
    is_false_F = nu_F >= LIMIT
    new = int((~is_false_F).sum())
    return Outcome(
        float((is_called_F & is_false_F).sum()) / max(int(is_called_F.sum()), 1),
        float((is_called_F & ~is_false_F).sum()) / new if new else float("nan"),
        float((is_below_F & is_false_F).sum()) / max(int(is_below_F.sum()), 1),
    )


def mean_interval(value_R: Tensor) -> str:
    """Mean of a few runs with its 95% interval by Student's t."""
    half = student_t_quantile(0.975, torch.tensor(len(value_R) - 1.0)) * value_R.std() / len(value_R) ** 0.5
    return f"{value_R.mean():.3f} +- {half:.3f}"


def main() -> None:
    """Print a row per prior and number of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[12, 25, 50, 100, 400])
    parser.add_argument("--latents", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=8)
    settings = parser.parse_args()
    print("| true ratios | documents | stated | really false | found | false by the ratio alone |")
    print("|---|---|---|---|---|---|")
    for prior in PRIORS:
        for documents in settings.documents:
            runs = [
                simulate(prior, documents=documents, latents=settings.latents, seed=seed)
                for seed in range(settings.seeds)
            ]
            false_R, found_R, by_ratio_R = torch.tensor(runs, dtype=torch.float64).unbind(1)
            found = "-" if found_R.isnan().all() else f"{found_R.mean():.2f}"
            name = prior.__name__.replace("_", " ")
            print(
                f"| {name} | {documents} | {RATE} | {mean_interval(false_R)} | {found} | {by_ratio_R.mean():.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
