"""Sweeps: which crosscoders a list of settings becomes, what they are called, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.crosscoder import CrosscoderSection
from pipeline.config.run_file import load, validated
from pipeline.config.sweeps import MAX_COMBINATIONS, with_sweeps
from pipeline.errors import InputError

ENTRY: dict[str, Any] = {"name": "topk", "sparsity": {"kind": "batch_topk", "aux_k": 8}, "num_latents": 64}
PLAIN: dict[str, Any] = ENTRY | {"sparsity": {"kind": "batch_topk", "k": 4}}
ROOT = Path(__file__).parent.parent.parent


def swept(sweep: Any, **changes: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = with_sweeps({"crosscoders": [ENTRY | {"sweep": sweep} | changes]})["crosscoders"]
    return entries


def test_every_combination_is_an_entry_of_its_own() -> None:
    entries = swept({"sparsity.k": [4, 8], "lr": [1e-4, 3e-4], "seed": [0, 1]}, seeds=2)
    assert [entry["name"] for entry in entries] == [
        f"topk-k{k}-lr{lr}-seed{seed}" for k in (4, 8) for lr in (0.0001, 0.0003) for seed in (0, 1)
    ]
    assert entries[5] == {
        **ENTRY,
        "name": "topk-k8-lr0.0001-seed1",
        "sparsity": {"kind": "batch_topk", "aux_k": 8, "k": 8},
        "lr": 1e-4,
        "seed": 1,
        "seeds": 2,
    }
    assert "k" not in ENTRY["sparsity"], "the entry itself is not changed"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"lr": [1e-5]}, ["topk-lr1e-05"]),
        ({"inputs": ["both", "difference"]}, ["topk-both", "topk-difference"]),
        ({"clip_norm": [None, 1.0]}, ["topk-clip_normnull", "topk-clip_norm1.0"]),
    ],
)
def test_names_tell_the_values(values: dict[str, Any], names: list[str]) -> None:
    entries = swept(values)
    assert [entry["name"] for entry in entries] == names
    for entry in entries:
        assert (
            CrosscoderSection.model_validate(entry | {"sparsity": entry["sparsity"] | {"k": 4}}).name == entry["name"]
        )


def test_entries_without_a_sweep_and_other_trees_stay_as_they_are() -> None:
    tree = {"crosscoders": [ENTRY, {"name": "b"}, "no entry"], "recipes": None, "name": "x"}
    assert with_sweeps(tree) == tree


@pytest.mark.parametrize(
    ("sweep", "field", "value"),
    [
        ([1, 2], "crosscoders.topk.sweep", "[1, 2]"),
        ({}, "crosscoders.topk.sweep", "{}"),
        ({"sparsity.k": 4}, "crosscoders.topk.sweep.sparsity.k", "4"),
        ({"sparsity.k": []}, "crosscoders.topk.sweep.sparsity.k", "[]"),
        ({"sparsity.k": [4, 4]}, "crosscoders.topk.sweep.sparsity.k", "[4, 4]"),
        ({"sparsity": [{"kind": "l1"}]}, "crosscoders.topk.sweep.sparsity", "{'kind': 'l1'}"),
        ({"seeds": [1, 2]}, "crosscoders.topk.sweep", "'seeds'"),
        ({"name.x": [1]}, "crosscoders.topk.sweep", "'name.x'"),
        ({"num_latents.x": [1]}, "crosscoders.topk.sweep.num_latents.x", "64"),
        ({"sparsity.k": list(range(1, 10)), "seed": list(range(10))}, "crosscoders.topk.sweep", "90"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(sweep: Any, field: str, value: str) -> None:
    with pytest.raises(ValueError) as caught:
        swept(sweep)
    assert str(caught.value).startswith(f"{field}: expected ") and value in str(caught.value)
    assert "\n" not in str(caught.value) and MAX_COMBINATIONS < 90


def run_file(folder: Path, *entries: dict[str, Any]) -> Path:
    tree = yaml.safe_load((ROOT / "workloads" / "demo.yaml").read_text())
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree | {"crosscoders": list(entries)}))
    return path


def test_a_run_file_holds_the_written_out_crosscoders(tmp_path: Path) -> None:
    path = run_file(tmp_path, ENTRY | {"sweep": {"sparsity.k": [4, 8]}, "seeds": 2})
    assert [(fit.name, fit.seed) for fit in load(path).fitted] == [
        ("topk-k4", 0),
        ("topk-k8", 0),
        ("topk-k4.seed1", 1),
        ("topk-k8.seed1", 1),
    ]
    assert [one.name for one in load(path, ["crosscoders.topk-k4.sweep={lr: [0.1, 0.2]}"]).crosscoders] == [
        "topk-k4-lr0.1",
        "topk-k4-lr0.2",
        "topk-k8",
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([ENTRY | {"sweep": {"sparsity.k": [4, 80]}}], "topk-k80.*k=80"),
        ([ENTRY | {"sweep": {"sparsity.kk": [4]}}], "sparsity.kk: unknown key"),
        ([ENTRY | {"sweep": {"sparsity.k": [4]}}, PLAIN | {"name": "topk-k4"}], "distinct names"),
        ([ENTRY | {"sweep": {"sparsity.k": [4, 4.0]}}], "expected other settings|k4.0"),
        (
            [ENTRY | {"sparsity": {"kind": "batch_topk", "k": 4}, "init_from": "x", "seeds": 2}],
            "seeds = 1 with init_from",
        ),
    ],
)
def test_what_a_run_file_refuses_names_the_entry(tmp_path: Path, entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(run_file(tmp_path, *entries))


def test_a_sweep_elsewhere_is_refused_and_neither_it_nor_no_start_enters_an_identity() -> None:
    with pytest.raises(InputError, match="sweep"):
        validated(CrosscoderSection, PLAIN | {"sweep": {"lr": [0.1]}}, "here")
    section = CrosscoderSection.model_validate(PLAIN)
    assert not {"sweep", "init_from"} & section.identity().keys()
    assert section.model_copy(update={"init_from": "x"}).identity()["init_from"] == "x"
