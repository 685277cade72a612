"""Where models come from, and what of it bears identity."""

import pytest
from pydantic import ValidationError

from pipeline.config.data import HubModel, OrganismModel
from pipeline.config.resources import ModelWorkersSection
from pipeline.run.identities import model_identity
from pipeline.stages.locations import locate
from pipeline.stages.models import model_spec


def test_token_replacements_reach_the_model_and_its_identity() -> None:
    plain = HubModel(source="name/base", revision="abc")
    replaced = HubModel(source="name/base", revision="abc", token_replacements={128009: 827, 128006: 1432})
    assert model_spec(locate(replaced)).token_replacements == ((128006, 1432), (128009, 827))
    assert model_spec(locate(plain)).token_replacements == ()
    assert model_identity(plain, "models.base") == {"source": "name/base", "source_revision": "abc"}
    expected = [(128006, 1432), (128009, 827)]
    assert model_identity(replaced, "models.base")["token_replacements"] == expected


def test_two_devices_need_two_gpus() -> None:
    with pytest.raises(ValidationError, match=r"two_devices.*gpus.*2.* 1"):
        ModelWorkersSection(placement="two_devices", gpus=1)
    assert ModelWorkersSection(placement="spread", gpus=4).placement == "spread"


def test_remote_code_stays_off_unless_asked_for() -> None:
    assert not model_spec(locate(HubModel(source="name/base"))).trust_remote_code
    assert not model_spec(locate(OrganismModel(kind="organism", member="base"), "folder")).trust_remote_code
    assert model_spec(locate(HubModel(source="name/base", trust_remote_code=True))).trust_remote_code
