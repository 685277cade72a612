"""Run files: strictness, overrides, and errors that a user can act on."""

import pickle
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from pipeline.config.crosscoder import CrosscoderSection
from pipeline.config.presets import PRESETS
from pipeline.config.run_file import RunConfig, load, load_as, read_tree
from pipeline.config.section import Section
from pipeline.errors import InputError
from pipeline.numerics.sparsities.registry import SPARSITIES
from pipeline.numerics.sparsities.topk import CountedSparsity
from pipeline.planted.settings import BenchmarkConfig

WORKLOADS = Path(__file__).parent.parent.parent / "workloads"


def minimal() -> dict[str, Any]:
    return {
        "name": "test",
        "organism": {},
        "models": {"base": {"kind": "organism", "member": "base"}, "chat": {"kind": "organism", "member": "chat"}},
        "corpus": {"sources": [{"name": "documents", "kind": "organism", "part": "documents"}]},
        "activations": {"layer": 1},
        "training": {"batch_rows": 64, "num_rows": 640},
        "crosscoders": [
            {"name": "l1", "num_latents": 64, "sparsity": {"kind": "l1", "mu": 0.1}},
            {"name": "btk", "num_latents": 64, "sparsity": {"kind": "batch_topk", "k": 8}},
        ],
    }


def write(folder: Path, tree: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def changed(path: str, value: Any) -> dict[str, Any]:
    """The minimal run with the value at a dotted path replaced; None removes the key."""
    tree = minimal()
    node: Any = tree
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


def all_sections(section: type[Section] = Section) -> list[type[Section]]:
    return [c for child in section.__subclasses__() for c in (child, *all_sections(child))]


@pytest.mark.parametrize("path", sorted(WORKLOADS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_workload_file_loads(path: Path) -> None:
    if "world" in read_tree(path):
        assert load_as(BenchmarkConfig, path).recipes
    else:
        assert load(path).crosscoders


def test_every_field_of_every_section_is_documented() -> None:
    own = [section for section in all_sections() if section.__module__.startswith("pipeline.")]
    undocumented = [
        f"{section.__name__}.{name}"
        for section in own
        for name, field in section.model_fields.items()
        if not field.description and name != "kind"
    ]
    assert len(own) > 20
    assert undocumented == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("crosscoders.0.num_latent", 64, ["crosscoders.l1.num_latent:", "'num_latents'"]),
        ("crosscoders.0.sparsity.muu", 1, ["crosscoders.l1.sparsity.muu:", "'mu'"]),
        ("trainin", {}, ["trainin:", "'training'"]),
        ("activations.layer", "two", ["activations.layer:", "'two'"]),
        ("activations.layer", -1, ["activations.layer:", "got -1"]),
        ("activations", None, ["activations:", "none"]),
        ("crosscoders.1.sparsity.k", 65, ["1 <= k <= num_latents = 64", "batch_topk", "k=65"]),
        ("crosscoders.1.sparsity.k_start", 65, ["1 <= k_start <= num_latents = 64", "batch_topk", "k_start=65"]),
        (
            "crosscoders",
            [
                {
                    "name": "a",
                    "num_latents": 8,
                    "sparsity": {"kind": "l1"},
                    "inputs": "difference",
                    "dedicated_frac": 0.1,
                }
            ],
            ["crosscoder 'a':", "dedicated_frac", "code_weight", "0.1"],
        ),
        ("crosscoders.1.expansion", 4, ["num_latents=64", "expansion=4"]),
        ("crosscoders.1.name", "l1", ["crosscoders:", "['l1', 'l1']"]),
        ("crosscoders.0.sparsity", {"kind": "l2"}, ["crosscoders.l1.sparsity", "'l2'"]),
        ("crosscoders.0.sparsity.mu", -1, ["crosscoders.l1.sparsity.mu:", "got -1"]),
        ("organism", None, ["organism:"]),
        ("resources", {"training": {"data": 3}}, ["training.batch_rows:", "multiple of 3", "got 64"]),
        (
            "resources",
            {"training": {"data": 4, "min_data": 2}},
            ["training.batch_rows:", "multiple of 3", "resources.training", "got 64"],
        ),
        (
            "resources",
            {"training": {"data": 1, "min_data": 2}},
            ["resources.training.min_data:", "data = 1", "got 2"],
        ),
        (
            "resources",
            {"training": {"data": 2, "min_data": 1, "latent": 2}},
            ["resources.training.min_data:", "latent = 2", "mode = store"],
        ),
        (
            "resources",
            {"extraction": {"custom": {"GPU": 1}}},
            ["resources.extraction.custom:", "'GPU'"],
        ),
        (
            "resources",
            {"training": {"custom": {"train": 0}}},
            ["resources.training.custom.train:", "0.0001", "got 0"],
        ),
        ("training.num_rows", 10, ["training.num_rows:", "training.batch_rows = 64", "got 10"]),
        ("corpus.sources", [], ["corpus.sources:", "[]"]),
        ("name", "a/b", ["name:", "'a/b'"]),
    ],
)
def test_a_wrong_value_is_named_in_one_line(tmp_path: Path, path: str, value: Any, named: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load(write(tmp_path, changed(path, value)))
    assert [part for part in named if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_key_env", "sk-hunter2-0123"),
        ("api_key_env", "lowercase_hunter2"),
        ("base_url", "https://user:hunter2@host/v1"),
        ("base_url", "https://host/v1?key=hunter2"),
        ("base_url", "hunter2"),
    ],
)
def test_a_secret_in_the_run_file_is_refused_and_not_repeated(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"resources\.autointerp\.{key}:") as error:
        load(write(tmp_path, changed("resources", {"autointerp": {key: value}})))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(("text", "came"), [("name: [", "line 1"), ("- 1", "list"), ("", "NoneType")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, came: str) -> None:
    with pytest.raises(InputError, match=rf"run\.yaml: .*{came}"):
        load(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


def test_overrides_reach_keys_that_the_file_does_not_mention_by_name_or_number(tmp_path: Path) -> None:
    path = write(tmp_path, minimal())
    config = load(path, ["crosscoders.l1.sparsity.mu=5e-1", "crosscoders.1.lr=1e-3", "resources.training.data=2"])
    assert config.crosscoders[0].sparsity.mu == 0.5  # type: ignore[union-attr]
    assert config.crosscoders[1].lr == 1e-3
    assert config.resources.training.data == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.num_row=3", ["training ", "'num_row'", "'num_rows'"]),
        ("crosscoders.l3.seed=1", ["crosscoders ", "'l3'", "'l1'"]),
        ("nonsense", ["--set", "'nonsense'"]),
        ("training.num_rows=many", ["training.num_rows:", "'many'"]),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, named: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load(write(tmp_path, minimal()), [override])
    assert [part for part in named if part not in str(error.value)] == []


def test_precedence_is_default_then_file_then_override(tmp_path: Path) -> None:
    assert load(write(tmp_path, minimal())).training.shuffle_seed == 0
    path = write(tmp_path, changed("training.shuffle_seed", 1))
    assert load(path).training.shuffle_seed == 1
    assert load(path, ["training.shuffle_seed=2"]).training.shuffle_seed == 2


def real_pair() -> dict[str, Any]:
    tree = minimal()
    del tree["organism"]
    tree["models"] = {"base": {"source": "a/base"}, "chat": {"source": "a/chat"}}
    tree["corpus"] = {"sources": [{"name": "web", "kind": "text", "paths": ["web.txt"]}]}
    return tree


def test_a_preset_lies_under_the_file(tmp_path: Path) -> None:
    tree = {**real_pair(), "preset": "qwen-2.5"}
    assert load(write(tmp_path, tree)).activations.drop_first_tokens == 21
    tree["activations"]["drop_first_tokens"] = 3
    assert load(write(tmp_path, tree)).activations.drop_first_tokens == 3
    assert load(write(tmp_path, tree), ["activations.drop_first_tokens=4"]).activations.drop_first_tokens == 4


def test_a_preset_reaches_the_base_model_and_leaves_the_rest_of_it(tmp_path: Path) -> None:
    base = load(write(tmp_path, {**real_pair(), "preset": "llama-3.1"})).models.base
    assert base.source == "a/base"  # type: ignore[union-attr]
    assert base.token_replacements == {128006: 1432, 128007: 827, 128009: 827}  # type: ignore[union-attr]


def test_a_preset_can_be_overridden_and_turned_off(tmp_path: Path) -> None:
    path = write(tmp_path, {**real_pair(), "preset": "llama-3.1"})
    assert load(path).activations.drop_first_tokens == 26
    assert load(path, ["preset=gemma-2"]).activations.drop_first_tokens == 0
    assert load(path, ["preset=null"]).activations.drop_first_tokens == 0
    assert load(write(tmp_path, real_pair()), ["preset=llama-3.2"]).activations.drop_first_tokens == 26
    with pytest.raises(InputError, match=r"preset: .*'gemma-2'.*got 'gemma'"):
        load(path, ["preset=gemma"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_leaves_its_name_out_of_identities(tmp_path: Path, name: str) -> None:
    named = load(write(tmp_path, {**real_pair(), "preset": name}))
    assert named.preset == name
    assert RunConfig.model_validate(named.model_dump(mode="json")) == named
    typed = load(write(tmp_path, {**named.model_dump(mode="json"), "preset": None}))
    assert (typed.activations, typed.models, typed.tokens) == (named.activations, named.models, named.tokens)


def test_a_preset_does_not_hide_a_broken_section(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"activations: .*got 'none'"):
        load(write(tmp_path, {**real_pair(), "preset": "gemma-2", "activations": "none"}))


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    text = yaml.safe_dump(changed("training.num_rows", 123456)).replace("123456", "1e5").replace("mu: 0.1", "mu: 1e-4")
    config = load(write(tmp_path, text))
    assert config.training.num_rows == 100_000
    assert config.crosscoders[0].sparsity.mu == 1e-4  # type: ignore[union-attr]


def test_a_model_without_kind_is_a_pretrained_one(tmp_path: Path) -> None:
    models = {"base": {"source": "google/gemma-2-2b"}, "chat": {"source": "google/gemma-2-2b-it"}}
    assert load(write(tmp_path, changed("models", models))).models.base.kind == "pretrained"


def test_sections_are_frozen_and_survive_json() -> None:
    config = RunConfig.model_validate(minimal())
    with pytest.raises(pydantic.ValidationError) as error:
        config.name = "other"  # type: ignore[misc]
    assert error.value.errors()[0]["type"] == "frozen_instance"
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_seeds_are_fits_of_their_own_and_no_two_fits_are_the_same(tmp_path: Path) -> None:
    l1 = minimal()["crosscoders"][0]
    config = load(write(tmp_path, changed("crosscoders", [{**l1, "seeds": 3}])))
    assert [(fit.name, fit.seed, fit.seeds) for fit in config.fitted] == [
        ("l1", 0, 3),
        ("l1.seed1", 1, 1),
        ("l1.seed2", 2, 1),
    ]
    assert len(load(write(tmp_path, changed("crosscoders", [l1])), ["crosscoders.l1.seeds=2"]).fitted) == 2
    for crosscoders in ([l1, {**l1, "name": "again"}], [{**l1, "seeds": 3}, {**l1, "name": "own", "seed": 2}]):
        with pytest.raises(InputError, match="crosscoders"):
            load(write(tmp_path, changed("crosscoders", crosscoders)))


@pytest.mark.parametrize("kind", SPARSITIES)
def test_sections_travel_to_workers(kind: str) -> None:
    """Workers of the benchmark get the recipes as they stand in the file."""
    needed = {"k": 4} if issubclass(SPARSITIES[kind], CountedSparsity) else {"target_l0": 4}
    section = CrosscoderSection.model_validate(
        {"name": "a", "num_latents": 64, "sparsity": {"kind": kind, **needed}, "seeds": 2, "power": {}}
    )
    for one in (section, *section.replicas()):
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(one) and again == one
