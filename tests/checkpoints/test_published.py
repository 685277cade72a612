"""Reading published checkpoints: small fabricated files of every layout, and every way in which one can be wrong."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fabricated import D, F, M, norm_tensors, old_config, published_tensors, topk_tensors, write, write_scaled
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoints.export import sort_header
from pipeline.checkpoints.layouts import PublishedCrosscoder
from pipeline.checkpoints.published import choose_weights, read_published
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder


def assert_same_weights(checkpoint: PublishedCrosscoder, tensors: dict[str, Tensor]) -> None:
    """Element by element, so that no axis can be mistaken for another."""
    for j in range(F):
        for m in range(M):
            assert torch.equal(checkpoint.W_enc_FMD[j, m], tensors["encoder.weight"][m, :, j])
            assert torch.equal(checkpoint.W_dec_FMD[j, m], tensors["decoder.weight"][m, j, :])
    assert torch.equal(checkpoint.b_enc_F, tensors["encoder.bias"])
    assert torch.equal(checkpoint.b_dec_MD, tensors["decoder.bias"])
    assert checkpoint.W_enc_FMD.is_contiguous()
    assert checkpoint.W_dec_FMD.is_contiguous()
    assert (checkpoint.num_latents, checkpoint.num_models, checkpoint.activation_dim) == (F, M, D)


def test_first_published_form_l1_means_crosscoder_weights_and_relu(tmp_path: Path) -> None:
    tensors = published_tensors()
    checkpoint = read_published(write(tmp_path, tensors, old_config()))
    assert_same_weights(checkpoint, tensors)
    assert (checkpoint.code_weight, checkpoint.dict_class) == ("crosscoder", "CrossCoder")
    assert checkpoint.k is None
    assert checkpoint.threshold is None
    assert checkpoint.norm is None


def test_batch_topk_form_carries_k_and_threshold(tmp_path: Path) -> None:
    tensors = topk_tensors()
    checkpoint = read_published(write(tmp_path, tensors, old_config(dict_class="BatchTopKCrossCoder", k=100)))
    assert_same_weights(checkpoint, tensors)
    assert checkpoint.dict_class == "BatchTopKCrossCoder"
    assert checkpoint.k == 3  # the tensor, not the constructor's default in config.json
    assert checkpoint.threshold is not None
    assert checkpoint.threshold.dtype == torch.float64
    assert checkpoint.threshold.shape == ()
    assert float(checkpoint.threshold) == 1.5


def test_batch_topk_is_recognised_without_any_settings(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(topk_tensors(), str(file))
    assert read_published(file).dict_class == "BatchTopKCrossCoder"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_bare_state_dict_with_compiled_prefix(tmp_path: Path, suffix: str) -> None:
    tensors = topk_tensors()
    file = tmp_path / f"ae{suffix}"
    torch.save({f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}, file)
    checkpoint = read_published(file)
    assert_same_weights(checkpoint, tensors)
    assert read_published(tmp_path).k == 3  # the folder's only weights file, whatever its name


def test_old_pickles_without_a_zip_archive_are_read_too(tmp_path: Path) -> None:
    file = tmp_path / "ae.pt"
    torch.save(published_tensors(), file, _use_new_zipfile_serialization=False)
    assert_same_weights(read_published(file), published_tensors())


@pytest.mark.parametrize(
    ("number", "name"), [(1, "crosscoder"), (2, "sae"), (3, "mixed"), (4, "none"), (5, "decoupled")]
)
def test_code_weight_is_read_from_the_tensor_and_from_the_name(tmp_path: Path, number: int, name: str) -> None:
    by_tensor = write(tmp_path / "tensor", published_tensors(code_normalization_id=torch.tensor(number)))
    by_name = write(tmp_path / "name", published_tensors(), old_config(code_normalization=name.upper()))
    assert read_published(by_tensor).code_weight == name
    assert read_published(by_name).code_weight == name


def test_decoupled_threshold_is_one_number_per_model(tmp_path: Path) -> None:
    tensors = topk_tensors(code_normalization_id=torch.tensor(5))
    tensors["threshold"] = torch.tensor([0.25, 0.75])
    threshold = read_published(write(tmp_path, tensors)).threshold
    assert threshold is not None
    assert threshold.tolist() == [0.25, 0.75]


def test_normalisation_is_read_and_nan_means_none(tmp_path: Path) -> None:
    norms = norm_tensors()
    norm = read_published(write(tmp_path / "with", published_tensors(**norms))).norm
    assert norm is not None
    assert torch.equal(norm.mean_MD, norms["activation_mean"])
    assert torch.equal(norm.scale_M, norms["activation_global_scale"])
    assert norm.target_rms == 10.0
    without = {
        key: torch.full_like(tensor, torch.nan) for key, tensor in norms.items() if key.endswith(("mean", "std"))
    }
    without |= {"target_rms": torch.tensor(1.0), "activation_global_scale": torch.ones(M)}
    assert read_published(write(tmp_path / "without", published_tensors(**without))).norm is None


def test_missing_global_scale_is_computed_from_the_variances(tmp_path: Path) -> None:
    norms = norm_tensors()
    scale_M = norms.pop("activation_global_scale")
    norm = read_published(write(tmp_path, published_tensors(**norms))).norm
    assert norm is not None
    torch.testing.assert_close(norm.scale_M, scale_M, rtol=1e-6, atol=0)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in published_tensors().items()}
    checkpoint = read_published(write(tmp_path, tensors))
    assert checkpoint.W_enc_FMD.dtype == torch.float32
    assert torch.equal(checkpoint.W_enc_FMD[1, 0], tensors["encoder.weight"][0, :, 1].float())


def test_encoder_that_reads_only_some_models_gets_zero_rows_for_the_others(tmp_path: Path) -> None:
    tensors = published_tensors()
    tensors["encoder.weight"] = tensors["encoder.weight"][1:].clone()
    checkpoint = read_published(write(tmp_path, tensors, old_config(encoder_layers=[1])))
    assert not checkpoint.W_enc_FMD[:, 0].any()
    assert torch.equal(checkpoint.W_enc_FMD[:, 1], tensors["encoder.weight"][0].T)


def test_trainer_settings_are_kept_and_name_the_class(tmp_path: Path) -> None:
    write(tmp_path, topk_tensors(), old_config())
    trainer = {"dict_class": "BatchTopKCrossCoder", "layer": 13, "lm_name": "a-b", "k": 3}
    (tmp_path / "trainer_config.json").write_text(json.dumps({"trainer": trainer}))
    checkpoint = read_published(tmp_path)
    assert checkpoint.settings["trainer"] == trainer
    assert checkpoint.dict_class == "BatchTopKCrossCoder"


def test_trainer_settings_in_config_json_are_understood(tmp_path: Path) -> None:
    """What a training run of the published library leaves beside its bare state dict."""
    torch.save(topk_tensors(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKCrossCoder", "layer": 13}}))
    checkpoint = read_published(tmp_path)
    assert checkpoint.dict_class == "BatchTopKCrossCoder"
    assert checkpoint.settings["trainer"]["layer"] == 13


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_was_read_does_not_change_with_the_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(published_tensors(), file)
    else:
        save_file(published_tensors(), str(file))
    checkpoint = read_published(file)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert_same_weights(checkpoint, published_tensors())


def test_scaled_layout_takes_its_scales_from_the_caller(tmp_path: Path) -> None:
    write_scaled(tmp_path / "blocks.14.hook_resid_pre")
    checkpoint = read_published(tmp_path, activation_scale=(0.3, 0.2))  # found in the only subfolder with weights
    assert_same_weights(checkpoint, published_tensors())
    assert checkpoint.norm is not None
    assert checkpoint.norm.scale_M.tolist() == pytest.approx([0.3, 0.2])
    assert not checkpoint.norm.mean_MD.any()
    assert not checkpoint.is_scale_unknown


def test_scaled_layout_without_scales_says_what_it_expects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = read_published(write_scaled(tmp_path / "a"))
    assert checkpoint.is_scale_unknown
    assert checkpoint.norm is None
    Crosscoder.from_pretrained(tmp_path / "a")
    assert "mean norm sqrt(D) = 2.2" in caplog.text


@pytest.mark.parametrize("scale", [(0.3,), (0.3, 0.0), (0.3, float("nan"))])
def test_scales_must_be_one_positive_number_per_model(tmp_path: Path, scale: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="activation_scale must hold 2 finite numbers above 0"):
        read_published(write_scaled(tmp_path / "a"), activation_scale=scale)


def test_scales_for_a_file_that_has_its_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave activation_scale out"):
        read_published(write(tmp_path, published_tensors()), activation_scale=(1.0, 1.0))


class Command:
    """Pickles to a call; loading it in the usual way would run the command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_that_would_run_code_are_refused_and_do_not_run(tmp_path: Path, how: str) -> None:
    canary, file = tmp_path / "ran", tmp_path / "weights.pt"
    content = {**published_tensors(), "extra": Command(canary)}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match="never loaded"):
        read_published(file)
    assert not canary.exists()


def test_whole_pickled_modules_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"state_dict\(\) alone"):
        read_published(tmp_path)


@pytest.mark.parametrize("key", ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"])
def test_missing_tensor_is_named(tmp_path: Path, key: str) -> None:
    tensors = published_tensors()
    del tensors[key]
    with pytest.raises(InputError, match=rf"but {key} is missing"):
        read_published(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("encoder.weight", (M, F, D)),
        ("encoder.weight", (M + 1, D, F)),
        ("encoder.bias", (F + 1,)),
        ("decoder.bias", (M, D + 1)),
        ("decoder.bias", (D,)),
        ("decoder.weight", (M, F)),
    ],
)
def test_shapes_that_disagree_are_named(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    tensors = {**published_tensors(), key: torch.ones(shape)}
    with pytest.raises(InputError, match=r"(?s)\w+\.\w+ must be .*model\.safetensors"):
        read_published(write(tmp_path, tensors))


@pytest.mark.parametrize("field", ["activation_dim", "dict_size", "num_layers"])
def test_settings_that_disagree_with_the_weights_are_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(InputError, match=rf"{field} in the settings must equal"):
        read_published(write(tmp_path, published_tensors(), old_config(**{field: 3})))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dict_class": "GatedAutoEncoder"}, "dict_class must be one of"),
        ({"dict_class": "BatchTopKCrossCoder"}, "holds k and threshold, came only weights"),
        ({"code_normalization": "OTHER"}, "code_normalization must be one of"),
        ({"code_normalization": "MIXED", "code_normalization_alpha_cc": 0.5}, "another mix is not supported"),
        ({"encoder_layers": [0]}, "encoder_layers must list"),
        ({"encoder_layers": [0, 0]}, "encoder_layers must list"),
        ({"latent_processor": "f"}, "latent_processor must be null"),
    ],
)
def test_settings_of_unknown_meaning_are_refused(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read_published(write(tmp_path, published_tensors(), old_config(**config)))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"code_normalization_id": torch.tensor(6)}, "must be 1 to 5"),
        ({"k": torch.tensor(3)}, "holds k and threshold, came k in"),
        ({"jump_threshold": torch.ones(F)}, "holds k and threshold, came jump_threshold"),
        ({"k": torch.tensor(F + 1), "threshold": torch.tensor(0.5)}, "k must be a whole number from 1 to F = 7"),
        ({"k": torch.tensor(3), "threshold": torch.tensor([0.5, 0.5])}, "threshold must hold 1 finite"),
        ({"k": torch.tensor(3), "threshold": torch.tensor(torch.nan)}, "threshold must hold 1 finite"),
        ({"log_threshold": torch.ones(F)}, "also holds log_threshold"),
        ({"activation_mean": torch.zeros(M, D)}, "come together, came activation_mean alone"),
        ({"encoder.bias": torch.full((F,), torch.nan)}, "must be finite, came 7 NaN"),
        ({"encoder.bias": torch.ones(F, dtype=torch.int64)}, "must be a floating-point tensor"),
    ],
)
def test_tensors_of_unknown_meaning_are_refused(tmp_path: Path, extra: dict[str, Tensor], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read_published(write(tmp_path, {**published_tensors(), **extra}))


def test_name_and_tensor_of_the_code_weight_must_agree(tmp_path: Path) -> None:
    tensors = published_tensors(code_normalization_id=torch.tensor(2))
    with pytest.raises(InputError, match=r"agree with code_normalization_id \(sae\)"):
        read_published(write(tmp_path, tensors, old_config(code_normalization="NONE")))


@pytest.mark.parametrize("name", ["model.safetensors", "ae.pt"])
@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_damaged_files_say_so(tmp_path: Path, name: str, kept: float) -> None:
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save(published_tensors(), file)
    else:
        save_file(published_tensors(), str(file))
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=rf"(?s)expected a .*{name}"):
        read_published(file)


def test_damaged_settings_say_so(tmp_path: Path) -> None:
    write(tmp_path, published_tensors())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON settings"):
        read_published(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="came list"):
        read_published(tmp_path)


def test_paths_that_hold_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected model\.safetensors or"):
        read_published(tmp_path)
    with pytest.raises(InputError, match="no such path exists here"):
        read_published(tmp_path / "absent")
    with pytest.raises(InputError, match="revision is for hub ids"):
        read_published(tmp_path, revision="main")
    (tmp_path / "weights.csv").write_text("")
    with pytest.raises(InputError, match="expected weights as"):
        read_published(tmp_path / "weights.csv")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["README.md", "model.safetensors", "optimizer.pt"], "model.safetensors"),
        (["cfg.json", "cc_weights.pt"], "cc_weights.pt"),
        (["b14/cfg.json", "b14/cc_weights.pt", "README.md"], "b14/cc_weights.pt"),
        (["ae.pt", "config.json", "checkpoints/ae_100.pt"], "ae.pt"),
        (["x.safetensors", "x.pt"], "x.safetensors"),
    ],
)
def test_choice_of_the_weights_file(names: list[str], chosen: str) -> None:
    assert choose_weights(names, "here") == chosen


@pytest.mark.parametrize("names", [["a/ae.pt", "b/ae.pt"], ["1.pt", "2.pt"], ["a/1.safetensors", "a/2.safetensors"]])
def test_ambiguous_folders_are_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match="expected one crosscoder"):
        choose_weights(names, "here")


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(1, dtype=torch.int64)}
    files = set()
    for seed in range(8):  # the library's order of metadata is drawn anew for every call
        metadata = {f"key{(index * 5 + seed) % 8}": '{"quoted": "\u00e4/\\n"}' for index in range(8)}
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        sort_header(path)
        files.add(path.read_bytes())
    assert len(files) == 1
    read = safetensors.torch.load_file(path)
    assert torch.equal(read["b"], tensors["b"])
    assert torch.equal(read["a"], tensors["a"])
