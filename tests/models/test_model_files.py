"""What a local model is identified by: the content of the files that its loader opens, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.data import HubModel
from pipeline.errors import InputError
from pipeline.run.identities import model_identity


def _identity(folder: Path, **settings: object) -> dict[str, object]:
    return model_identity(HubModel(source=str(folder), **settings), "models.chat")  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names and bytes of a sharded checkpoint; nothing here is loaded."""
    model = tmp_path / "model"
    model.mkdir()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        (model / shard).write_bytes(b"0" * 1000)
    weight_map = {f"layer.{number}": shard for number, shard in enumerate(shards)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        (model / name).write_text("{}")
    (model / "modeling_own.py").write_text("x = 1")
    return model


def _append(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("ab") as stream:
            stream.write(b" ")

    return change


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-00002-of-00002.safetensors", "weights"),
        ("config.json", "config"),
        ("generation_config.json", "config"),
        ("tokenizer.json", "tokenizer"),
        ("special_tokens_map.json", "tokenizer"),
        ("vocab.txt", "tokenizer"),
        ("spiece.model", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("additional_chat_templates/tool.jinja", "tokenizer"),
        ("adapter_model.safetensors", "adapter"),
    ],
)
def test_what_is_loaded_decides_and_the_difference_is_named(folder: Path, name: str, kind: str) -> None:
    before = _identity(folder)["source"]
    _append(name)(folder)
    after = _identity(folder)["source"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert {key for key in before | after if before.get(key) != after.get(key)} == {kind}


def test_shards_that_differ_in_the_middle_are_two_models(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert _identity(other) == _identity(folder)
    with (other / "model-00001-of-00002.safetensors").open("r+b") as stream:
        stream.seek(500)
        stream.write(b"1")
    assert _identity(other) != _identity(folder)


@pytest.mark.parametrize(
    "name",
    [
        ".cache/huggingface/download/model.safetensors.lock",
        ".gitattributes",
        "README.md",
        "LICENSE",
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "pytorch_model.bin",  # the loader prefers safetensors
        "consolidated.safetensors",
        "checkpoint-500/model.safetensors",
        "runs/events.out",
        "modeling_own.py",
    ],
)
def test_what_is_not_loaded_is_not_the_model(folder: Path, name: str) -> None:
    before = _identity(folder)
    _append(name)(folder)
    assert _identity(folder) == before


def test_code_belongs_to_a_model_that_may_run_it(folder: Path) -> None:
    before = _identity(folder, trust_remote_code=True)
    _append("modeling_own.py")(folder)
    assert _identity(folder, trust_remote_code=True) != before


def test_links_into_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    (linked / "tokenizer.model").symlink_to(tmp_path / "nowhere")
    assert _identity(linked) == _identity(folder)


def test_an_adapter_is_its_weights_and_config(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"0")
    before = _identity(folder, adapter=str(adapter))
    (adapter / "tokenizer.json").write_text("{}")
    assert _identity(folder, adapter=str(adapter)) == before
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    assert _identity(folder, adapter=str(adapter)) != before


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.safetensors", "a/../../outside.safetensors", "\0", 5])
def test_an_index_that_names_files_elsewhere_reads_none_of_them(folder: Path, name: object) -> None:
    (folder.parent / "outside.safetensors").write_bytes(b"0")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    found = _identity(folder)["source"]
    assert isinstance(found, dict)
    assert "weights" not in found


@pytest.mark.parametrize("source", ["/" + "x" * 300, "~nobody-of-this-name/model", "./absent", "a/b/c"])
def test_a_path_that_cannot_be_is_one_line(source: str) -> None:
    with pytest.raises(InputError, match=r"models\.chat\.source: "):
        model_identity(HubModel(source=source), "models.chat")


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(InputError, match=r"models\.chat\.source.*model-00001"):
        _identity(folder / "model-00001-of-00002.safetensors")
