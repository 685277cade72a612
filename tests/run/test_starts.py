"""What a fit begins with is part of its identity by content; how many are fitted at once decides memory alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.crosscoder import CrosscoderSection
from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.numerics.trainer import CrosscoderTrainer
from pipeline.planning.sizes import training_bytes
from pipeline.run.identities import fitted_identity
from tests.numerics.small import make_spec

DEMO = Path(__file__).parent.parent.parent / "workloads" / "demo.yaml"
ENTRY: dict[str, Any] = {"name": "a", "sparsity": {"kind": "batch_topk", "k": 4}, "num_latents": 32}


def section(source: Path | str | None) -> CrosscoderSection:
    return CrosscoderSection.model_validate(ENTRY | {"init_from": None if source is None else str(source)})


def test_a_start_is_known_by_its_content(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        CrosscoderTrainer(make_spec(seed=seed)).crosscoder().save_pretrained(tmp_path / name)
    a, b, c = (fitted_identity(section(tmp_path / name)) for name in "abc")
    assert a == b != c and all(text.startswith("sha256:") for text in a["init_from"])
    assert fitted_identity(section("owner/name"))["init_from"] == "owner/name"
    assert fitted_identity(section(None)) == section(None).identity()
    with pytest.raises(InputError, match=r"crosscoder 'a': init_from: .*/nothing"):
        fitted_identity(section(tmp_path / "nothing"))


@pytest.mark.parametrize(("at_a_time", "num_at_once"), [(None, 3), (1, 1), (2, 2), (9, 3)])
def test_memory_of_training_is_that_of_what_is_fitted_at_once(
    tmp_path: Path, at_a_time: int | None, num_at_once: int
) -> None:
    tree = yaml.safe_load(DEMO.read_text())
    path = tmp_path / "run.yaml"
    training = {"fits_at_a_time": at_a_time}
    entry = ENTRY | {"sweep": {"lr": [1e-3, 2e-3, 3e-3]}}
    path.write_text(yaml.safe_dump(tree | {"crosscoders": [entry], "resources": {"training": training}}))
    config, width = load(path), 16
    rows_part = 2.5 * config.training.batch_rows * 32 * 4
    assert training_bytes(config, width) == int(num_at_once * 2 * 2 * width * 32 * 16 + rows_part)
