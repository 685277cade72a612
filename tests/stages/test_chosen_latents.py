"""Latents that a user names: an index that does not exist or a latent that never fires is refused before any work."""

import pandas as pd
import pytest

from pipeline.config.analyses import CausalitySection, ExamplesSection
from pipeline.errors import InputError
from pipeline.stages.examples import check_example_latents
from pipeline.stages.steering import check_latents

LATENTS = pd.DataFrame({"latent": [0, 1, 2], "max_activation": [1.5, 0.0, float("nan")]})


def test_steering_refuses_latents_that_do_not_exist_or_never_fire() -> None:
    check_latents((0,), LATENTS)
    with pytest.raises(InputError, match=r"analyses\.steering\.latents: .* between 0 and 2, got 3"):
        check_latents((0, 3), LATENTS)
    for silent in (1, 2):
        with pytest.raises(InputError, match=f"latent {silent} never does"):
            check_latents((silent,), LATENTS)


def test_examples_refuse_latents_that_do_not_exist() -> None:
    check_example_latents(ExamplesSection(latents=(0, 127)), 128)
    check_example_latents(ExamplesSection(latents="all"), 128)
    with pytest.raises(InputError, match=r"analyses\.examples\.latents: .* between 0 and 127, got 128"):
        check_example_latents(ExamplesSection(latents=(5, 128)), 128)


def test_causality_sets_must_be_possible() -> None:
    with pytest.raises(ValueError, match="min_latents of at most max_latents, got 9 and 8"):
        CausalitySection(min_latents=9, max_latents=8)
