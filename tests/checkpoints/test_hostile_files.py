"""Published crosscoders whose settings, tensors or bytes are of the wrong kind: one short line, and no code runs."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fabricated import M, norm_tensors, old_config, topk_tensors, write
from safetensors.torch import save_file

from pipeline.checkpoints.published import read_published
from pipeline.errors import InputError


def refusal(path: Path) -> str:
    """The line that refuses a crosscoder."""
    with pytest.raises(InputError) as caught:
        read_published(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    return line


WRONG: list[Any] = [[1], {"a": [1]}, "x" * 40_000, 5.5, True]
RIGHT: dict[str, Any] = {"norm_init_scale": 5.5, "code_normalization_alpha_sae": 5.5, "trainer": {"a": [1]}}
NAMES = (
    *("activation_dim", "dict_size", "num_layers", "num_decoder_layers", "k", "norm_init_scale", "encoder_layers"),
    *("code_normalization_alpha_sae", "code_normalization", "dict_class", "trainer", "latent_processor"),
)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in NAMES for v in WRONG if RIGHT.get(n) != v])
def test_settings_of_another_type_are_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    assert f"{name} must " in refusal(write(tmp_path, topk_tensors(), old_config(**{name: value})))


@pytest.mark.parametrize("layers", [[True, False], ["0", "1"], [0.0, 1.0], [None, None]])
def test_models_that_an_encoder_reads_are_whole_numbers(tmp_path: Path, layers: list[Any]) -> None:
    assert "encoder_layers must " in refusal(write(tmp_path, topk_tensors(), old_config(encoder_layers=layers)))


@pytest.mark.parametrize("trainer", [{"dict_class": [1]}, {"trainer": {"dict_class": 5}}, {"trainer": "text"}])
def test_the_trainer_s_settings_are_checked_too(tmp_path: Path, trainer: Any) -> None:
    folder = write(tmp_path, topk_tensors(), old_config())
    (folder / "trainer_config.json").write_text(json.dumps(trainer))
    assert " must be " in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    "key", ["activation_mean", "activation_std", "activation_global_scale", "target_rms", "threshold"]
)
def test_normalisation_and_thresholds_are_no_whole_numbers(tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    tensors = {**topk_tensors(), **norm_tensors()}
    tensors[key] = tensors[key].to(dtype)
    assert f"{key} must be a floating-point tensor" in refusal(write(tmp_path, tensors))


@pytest.mark.parametrize("key", ["k", "code_normalization_id"])
@pytest.mark.parametrize("value", [torch.tensor(True), torch.tensor(1 + 1j), torch.tensor(1.5)])
def test_counts_are_whole_numbers(tmp_path: Path, key: str, value: torch.Tensor) -> None:
    tensors = {**topk_tensors(code_normalization_id=torch.tensor(1)), key: value}
    assert f"{key} must be " in refusal(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_rms": torch.tensor(-3.0)}, "target_rms"),
        ({"target_rms": torch.tensor(0.0)}, "target_rms"),
        ({"activation_std": -norm_tensors()["activation_std"]}, "activation_std"),
        ({"activation_global_scale": -torch.ones(M)}, "scales"),
        ({"activation_mean": None}, "activation_std alone"),
        ({"activation_mean": None, "activation_std": None}, "activation_global_scale alone"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    tensors = {**topk_tensors(), **norm_tensors(), **changes}
    assert named in refusal(write(tmp_path, {key: tensor for key, tensor in tensors.items() if tensor is not None}))


@pytest.mark.parametrize("key", ["encoder.weight", "decoder.bias", "threshold"])
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_numbers_are_refused(tmp_path: Path, key: str, kind: str) -> None:
    tensors = topk_tensors()
    tensors[key] = tensors[key].to_sparse() if kind == "sparse" else tensors[key].to("meta")
    torch.save(tensors, tmp_path / "ae.pt")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"dict_size": ' + b"9" * 5000 + b"}", b"\0" * 9, b"", b"\xff\xfe{"]
)
def test_settings_that_are_no_json_for_any_reader(tmp_path: Path, text: bytes) -> None:
    write(tmp_path, topk_tensors())
    (tmp_path / "config.json").write_bytes(text)
    assert "config.json" in refusal(tmp_path)


def test_settings_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path, topk_tensors())
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(old_config()).encode())
    assert read_published(tmp_path).k == 3


@pytest.mark.parametrize("header", ["5", "[1]", "{", "[" * 100_000, '{"threshold": "x"}', '{"threshold": {"a": 1}}'])
def test_our_own_header_is_checked_like_anyone_s(tmp_path: Path, header: str) -> None:
    save_file(topk_tensors(), str(tmp_path / "model.safetensors"), metadata={"crossray": header})
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        b"<html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_other_bytes_under_the_name_of_weights(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("form", ["zip", "plain", "safetensors"])
def test_flipped_bytes_never_end_in_another_error(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "ae.pt")
    if form == "safetensors":
        save_file(topk_tensors(), str(path))
    else:
        torch.save(topk_tensors(), path, _use_new_zipfile_serialization=form == "zip")
    data, chance = path.read_bytes(), random.Random(0)
    num_refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3, 20])):
            damaged[chance.randrange(min(len(data), 1500))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_published(path)
        except InputError as error:
            num_refused += 1
            assert len(str(error)) < 1000
    assert num_refused > 20
