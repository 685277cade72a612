import pytest

from pipeline.analyses.quality import Limits, shortcomings

GOOD = {
    "fve_base": 0.8, "fve_chat": 0.8, "fve": 0.8, "l0": 16.0, "dead_frac": 0.1, "mean_norm_base": 1.0,
    "mean_norm_chat": 1.0, "num_rows": 10_000, "fve_standardised": 0.7, "fve_without_sinks": 0.8, "num_sinks": 0,
}  # fmt: skip
ENOUGH = {"num_latents": 256, "num_training_rows": 100_000, "num_documents": 200}


def found(changes: dict[str, float], **counts: int | None) -> tuple[str, ...]:
    return shortcomings(GOOD | changes, **(ENOUGH | counts), limits=Limits())  # type: ignore[arg-type]


def test_a_good_fit_lacks_nothing() -> None:
    assert found({}) == ()
    assert found({}, num_training_rows=None) == ()  # from elsewhere: nobody knows
    assert found({"num_sinks": 72}) == ()


@pytest.mark.parametrize(
    ("changes", "counts", "number"),
    [
        ({"fve_base": 0.41}, {}, "0.41"),
        ({"fve_chat": 0.31}, {}, "0.31"),
        ({"fve_base": float("nan"), "fve": 0.7, "fve_chat": 0.8}, {}, "nan"),
        ({"fve_base": float("nan"), "fve": 0.2, "fve_chat": 0.2, "fve_without_sinks": 0.2}, {}, "0.20"),
        ({"fve_without_sinks": 0.3, "num_sinks": 72}, {}, "0.30"),
        ({"fve_base": float("nan"), "fve_chat": float("nan"), "fve_without_sinks": 0.2}, {}, "0.20"),
        ({"dead_frac": 0.99}, {}, "99%"),
        ({}, {"num_training_rows": 58 * 64}, "3,712"),
        ({}, {"num_documents": 12}, "12"),
    ],
)
def test_each_shortcoming_is_said_with_its_number(
    changes: dict[str, float], counts: dict[str, int], number: str
) -> None:
    (phrase,) = found(changes, **counts)
    assert number in phrase


def test_every_shortcoming_is_said() -> None:
    everything = {"fve_base": 0.1, "fve_chat": 0.1, "dead_frac": 1.0}
    assert len(found(everything, num_training_rows=1, num_documents=1)) == 5
