"""Hyper-parameters stand once: every field is documented, and the sections of a run file hold the same fields."""

import dataclasses
from typing import Any, get_args

import pytest

from pipeline.config.crosscoder import CrosscoderSection, SparsitySection, field_docs
from pipeline.numerics.settings import Settings
from pipeline.numerics.sparsities.registry import SPARSITIES
from pipeline.numerics.spec import CrosscoderSpec, FitSettings

SECTIONS: dict[str, type[SparsitySection]] = {
    get_args(section.model_fields["kind"].annotation)[0]: section
    for section in get_args(CrosscoderSection.model_fields["sparsity"].annotation)
}
LEAST: dict[str, Any] = {"name": "a", "num_latents": 128}


@pytest.mark.parametrize("kind", [FitSettings, CrosscoderSpec, *SPARSITIES.values()])
def test_every_field_is_documented_under_it(kind: type[Settings]) -> None:
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        assert docs[field.name].endswith("."), field.name


def test_a_run_file_knows_the_sparsities_of_the_registry() -> None:
    assert SECTIONS.keys() == SPARSITIES.keys()


@pytest.mark.parametrize("kind", SPARSITIES)
def test_a_sparsity_section_has_the_fields_of_the_settings_and_gives_them_back(kind: str) -> None:
    settings = SPARSITIES[kind]()
    assert set(SECTIONS[kind].model_fields) == {"kind", *dataclasses.asdict(settings)}
    section = CrosscoderSection(**LEAST, sparsity={"kind": kind})
    assert section.sparsity.settings() == settings
    init_norm, clip_norm = (0.005, None) if kind.endswith("l1") else (1.0, 1.0)
    assert section.settings() == FitSettings(init_norm=init_norm, clip_norm=clip_norm)
    assert section.model_dump()["sparsity"] == {"kind": kind, **dataclasses.asdict(settings)}
    for name, field in SECTIONS[kind].model_fields.items():
        if name != "kind":
            assert field.description == field_docs(SPARSITIES[kind])[name]


def test_what_two_settings_forbid_together_is_the_sections_fault() -> None:
    for changes, value in (
        ({"num_latents": 99}, "k=100"),
        ({"inputs": "difference", "code_weight": "decoupled"}, "'decoupled'"),
    ):
        with pytest.raises(ValueError, match=f"crosscoder 'a': .*{value}"):
            CrosscoderSection(**(LEAST | changes), sparsity={"kind": "batch_topk"})  # type: ignore[arg-type]
