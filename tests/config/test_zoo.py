"""The organisms of workloads/zoo/: what the family must hold."""

from pathlib import Path

from pipeline.config.data import OrganismModel
from pipeline.config.run_file import RunConfig, load

FOLDER = Path(__file__).parent.parent.parent / "workloads" / "zoo"
ZOO: dict[str, RunConfig] = {path.stem: load(path) for path in sorted(FOLDER.glob("*.yaml"))}


def test_the_family_differs_in_its_organisms_alone() -> None:
    assert (
        len({tuple(config.organism.model_dump().items()) for config in ZOO.values() if config.organism}) == len(ZOO) - 1
    )
    first = ZOO["full"]
    for name, config in ZOO.items():
        assert config.name == f"zoo-{name}"
        for part in ("corpus", "tokens", "activations", "training", "crosscoders"):
            assert getattr(config, part) == getattr(first, part), (name, part)


def test_it_holds_every_kind_and_two_controls() -> None:
    sections = {name: config.organism for name, config in ZOO.items() if config.organism is not None}
    assert {section.method for section in sections.values()} == {"full", "lora"}
    assert {len(section.behaviors) for section in sections.values()} == {0, 1, 4}
    doses = {section.dose for section in sections.values()}
    assert min(doses) < 1 < max(doses)
    assert any(not section.ordinary_chat for section in sections.values())
    assert any(section.weight_penalty for section in sections.values())
    members = {name: config.models.chat for name, config in ZOO.items()}
    untouched = [name for name, own in members.items() if isinstance(own, OrganismModel) and own.member == "base"]
    assert untouched == ["untouched"]
    assert [name for name, section in sections.items() if not section.behaviors] == ["harmless"]
    for name, config in ZOO.items():
        assert (config.analyses.planted is None) == (name in ("harmless", "untouched"))
