"""How many tokens a run takes of each corpus, given their sizes, weights and the budget.

The tokens stage cuts corpora to these numbers, document by document; the plan predicts with them. Nothing here reads a
document.
"""

from collections.abc import Mapping


def tokens_to_take(
    have: Mapping[str, float], weights: Mapping[str, float], budget: float | None, *, mixing: str
) -> dict[str, float]:
    """Tokens taken of each corpus, at most what it has.

    "by_weight": shares follow the weights whatever the corpora's sizes are, so the corpus that runs out first sets the
    total. "everything": a corpus that runs out gives all that it has and the others keep their parts of the budget;
    without a budget everything is taken.
    """
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    total = float("inf") if budget is None else float(budget)
    if mixing == "by_weight":
        total = min(total, *(have[name] / share for name, share in shares.items()))
    return {name: min(have[name], total * share) for name, share in shares.items()}
