"""What is written can be read by others (their keys, axes, dtypes, fields) and by us, and never in part."""

import json
from pathlib import Path

import pytest
import torch
from fabricated import D, F, M, norm_tensors, old_config, published_tensors, topk_tensors, write, write_scaled
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoints import export
from pipeline.checkpoints.export import write_published
from pipeline.checkpoints.hub import push_published
from pipeline.checkpoints.published import read_published
from pipeline.errors import InputError

FILES = {
    "l1": published_tensors(),
    "batch_topk": topk_tensors(),
    "sae weight": topk_tensors(code_normalization_id=torch.tensor(2)),
    "mixed weight": topk_tensors(code_normalization_id=torch.tensor(3)),
    "decoupled": {**topk_tensors(code_normalization_id=torch.tensor(5)), "threshold": torch.tensor([0.5, 0.25])},
    "normalised": topk_tensors(**norm_tensors()),
}


@pytest.mark.parametrize("tensors", FILES.values(), ids=FILES)
def test_written_files_hold_the_tensors_that_were_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = read_published(write(tmp_path / "theirs", tensors))
    write_published(tmp_path / "ours", checkpoint)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    for key, tensor in tensors.items():
        assert torch.equal(written[key], tensor), key
        assert written[key].dtype == tensor.dtype, key
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"model.safetensors", "config.json"}
    again = read_published(tmp_path / "ours")
    for name in ("W_enc_FMD", "b_enc_F", "W_dec_FMD", "b_dec_MD"):
        assert torch.equal(getattr(again, name), getattr(checkpoint, name))
    assert (again.code_weight, again.dict_class, again.k) == (
        checkpoint.code_weight,
        checkpoint.dict_class,
        checkpoint.k,
    )


def test_config_holds_what_the_published_constructors_take_and_nothing_else(tmp_path: Path) -> None:
    write_published(tmp_path / "a", read_published(write(tmp_path / "b", topk_tensors())))
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == {
        "activation_dim": D,
        "dict_size": F,
        "num_layers": M,
        "encoder_layers": None,
        "same_init_for_all_layers": True,
        "norm_init_scale": 1.0,
        "init_with_transpose": True,
        "code_normalization": "CROSSCODER",
        "dict_class": "BatchTopKCrossCoder",
        "k": 3,
    }


def test_settings_of_the_file_that_was_read_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "a", published_tensors(), old_config(init_with_transpose=False))
    (tmp_path / "a" / "trainer_config.json").write_text(json.dumps({"trainer": {"layer": 13, "lm_name": "x-y"}}))
    write_published(tmp_path / "b", read_published(tmp_path / "a"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["init_with_transpose"] is False
    assert read_published(tmp_path / "b").settings["trainer"] == {"layer": 13, "lm_name": "x-y"}
    write_published(tmp_path / "b", read_published(tmp_path / "a"), trainer={"layer": 7})
    assert json.loads((tmp_path / "b" / "trainer_config.json").read_text()) == {"trainer": {"layer": 7}}


def test_no_normalisation_is_written_as_nan(tmp_path: Path) -> None:
    write_published(tmp_path / "a", read_published(write(tmp_path / "b", published_tensors())))
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert written["activation_mean"].shape == (M, D)
    assert bool(written["activation_mean"].isnan().all())
    assert bool(written["activation_std"].isnan().all())
    assert written["activation_global_scale"].tolist() == [1.0, 1.0]


def test_a_given_scale_is_written_as_standard_deviations_that_imply_it(tmp_path: Path) -> None:
    checkpoint = read_published(write_scaled(tmp_path / "a"), activation_scale=(0.3, 0.2))
    write_published(tmp_path / "b", checkpoint)
    written = load_file(tmp_path / "b" / "model.safetensors")
    implied_M = written["target_rms"] / written["activation_std"].square().sum(1).sqrt()
    torch.testing.assert_close(implied_M, torch.tensor([0.3, 0.2]), rtol=1e-6, atol=0)
    norm = read_published(tmp_path / "b").norm
    assert norm is not None
    assert norm.scale_M.tolist() == pytest.approx([0.3, 0.2])


def test_an_unknown_scale_cannot_be_written(tmp_path: Path) -> None:
    checkpoint = read_published(write_scaled(tmp_path / "a"))
    with pytest.raises(InputError, match=r"activation_scale"):
        write_published(tmp_path / "b", checkpoint)
    assert not (tmp_path / "b").exists()


def test_header_says_which_model_comes_first(tmp_path: Path) -> None:
    write_published(tmp_path / "a", read_published(write(tmp_path / "b", published_tensors())))
    with safe_open(str(tmp_path / "a" / "model.safetensors"), framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert header["model_order"] == "base,chat"


def test_threshold_keeps_all_its_bits_unless_somebody_changed_the_file(tmp_path: Path) -> None:
    exact = 0.1 + 1e-12
    checkpoint = read_published(write(tmp_path / "b", topk_tensors()))
    write_published(tmp_path / "a", checkpoint._replace(threshold=torch.tensor(exact, dtype=torch.float64)))
    threshold = read_published(tmp_path / "a").threshold
    assert threshold is not None
    assert float(threshold) == exact
    file = tmp_path / "a" / "model.safetensors"
    with safe_open(str(file), framework="pt") as opened:
        header = opened.metadata()
    save_file({**load_file(file), "threshold": torch.tensor(0.5)}, str(file), metadata=header)
    threshold = read_published(tmp_path / "a").threshold
    assert threshold is not None
    assert float(threshold) == 0.5


def test_nothing_that_could_not_be_read_again_is_written(tmp_path: Path) -> None:
    checkpoint = read_published(write(tmp_path / "b", published_tensors()))
    with pytest.raises(InputError, match=r"encoder\.bias must be finite, came 7 NaN"):
        write_published(tmp_path / "a", checkpoint._replace(b_enc_F=torch.full((F,), torch.nan)))
    assert not (tmp_path / "a").exists()


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_published(write(tmp_path / "b", published_tensors()))
    write_published(tmp_path / "a", checkpoint)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def fail(path: Path, _: object) -> None:
        path.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "_write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        write_published(tmp_path / "a", checkpoint)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_push_to_nowhere_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected to write to the hub repository not a name"):
        push_published("not a name", tmp_path)
