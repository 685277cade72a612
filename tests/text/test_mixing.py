import pytest

from pipeline.text.mixing import tokens_to_take

HAVE = {"web": 900, "chat": 100}
WEIGHTS = {"web": 1.0, "chat": 1.0}


@pytest.mark.parametrize(
    ("budget", "mixing", "web", "chat"),
    [
        (None, "by_weight", 100, 100),  # chat runs out first and sets the total
        (None, "everything", 900, 100),
        (60, "by_weight", 30, 30),
        (600, "by_weight", 100, 100),
        (600, "everything", 300, 100),  # chat gives all it has, web keeps its part
    ],
)
def test_shares_follow_the_weights_and_the_budget(budget: int | None, mixing: str, web: float, chat: float) -> None:
    assert tokens_to_take(HAVE, WEIGHTS, budget, mixing=mixing) == {"web": web, "chat": chat}
