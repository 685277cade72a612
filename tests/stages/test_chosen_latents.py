"""Latents that a user names: an index that does not exist or a latent that never fires is refused before any work."""

import pandas as pd
import pytest

from pipeline.analyses.latent_sets import listed_latents
from pipeline.config.analyses import CausalitySection, ExamplesSection
from pipeline.errors import InputError
from pipeline.schema import Verdict
from pipeline.stages.examples import check_example_latents
from pipeline.stages.steering import best_latents, check_latents

LATENTS = pd.DataFrame({"latent": [0, 1, 2], "max_activation": [1.5, 0.0, float("nan")]})


def test_steering_refuses_latents_that_do_not_exist_or_never_fire() -> None:
    check_latents((0,), LATENTS)
    with pytest.raises(InputError, match=r"analyses\.steering\.latents: .* between 0 and 2, got 3"):
        check_latents((0, 3), LATENTS)
    for silent in (1, 2):
        with pytest.raises(InputError, match=f"latent {silent} never does"):
            check_latents((silent,), LATENTS)


def test_a_behaviour_that_no_chat_specific_latent_finds_is_steered_by_the_best_live_one() -> None:
    rows = [
        ("a", "chat-specific latent", 3, 0.7),
        ("a", "chat-specific latent", 4, 0.8),
        ("a", "any latent", 5, 0.99),
        ("b", "chat-specific latent", -1, float("nan")),
        ("b", "any latent", 6, 0.9),
        ("b", "any latent", 7, 0.95),
        ("b", "linear probe", -1, 1.0),
        ("c", "chat-specific latent", -1, float("nan")),
        ("c", "any latent", 7, 0.5),
    ]
    planted = pd.DataFrame(rows, columns=["behavior", "candidate", "latent", "auroc"])
    latents = pd.DataFrame({"latent": range(8), "max_activation": [1.0] * 7 + [0.0]})
    assert best_latents(planted, latents) == {"a": (4,), "b": (6,)}


def test_examples_refuse_latents_that_do_not_exist() -> None:
    check_example_latents(ExamplesSection(latents=(0, 127)), 128)
    check_example_latents(ExamplesSection(latents="all"), 128)
    with pytest.raises(InputError, match=r"analyses\.examples\.latents: .* between 0 and 127, got 128"):
        check_example_latents(ExamplesSection(latents=(5, 128)), 128)


def test_listed_latents_are_chat_specific_first_then_the_others_that_are_not_shared_then_those_named() -> None:
    verdicts = [Verdict.SHARED, Verdict.STRONGER, Verdict.CHAT_SPECIFIC, Verdict.DEAD, Verdict.DECOUPLING]
    verdicts += [Verdict.CHAT_SPECIFIC]
    table = pd.DataFrame({"latent": range(6), "verdict": verdicts, "delta_norm": [0.5, 0.7, 0.92, 0.5, 0.95, 0.99]})
    where = "analyses.logit_lens.latents"
    assert listed_latents(table, named=(), max_latents=9, where=where) == (5, 2, 4, 1)
    assert listed_latents(table, named=(0, 2), max_latents=3, where=where) == (5, 2, 4, 0)
    assert listed_latents(table, named="all", max_latents=1, where=where) == tuple(range(6))
    with pytest.raises(InputError, match=r"analyses\.logit_lens\.latents: .* between 0 and 5, got \[6\]"):
        listed_latents(table, named=(6,), max_latents=3, where=where)


def test_causality_sets_must_be_possible() -> None:
    with pytest.raises(ValueError, match="min_latents of at most max_latents, got 9 and 8"):
        CausalitySection(min_latents=9, max_latents=8)
