"""A crosscoder of a finished run, written for others and read again: the numbers, the card, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finished_runs import HOSTILE
from safetensors.torch import load_file

import crossray
from pipeline.arguments import FORMS
from pipeline.cli import main
from pipeline.exports import delphi, forms
from pipeline.exports.forms import export
from pipeline.exports.markdown import front_matter, plain
from pipeline.library.rows import Rows


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The YAML at the top of a README.md, and the Markdown below it."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_command_line_offers_the_forms_that_there_are() -> None:
    assert tuple(forms.FORMS) == FORMS


def test_the_published_layout_gives_the_runs_codes_again(run: crossray.Run, rows: Rows, tmp_path: Path) -> None:
    folder = export(run, "batch_topk", tmp_path / "new" / "cc")
    read, own = crossray.Crosscoder.from_pretrained(folder), run.crosscoder("batch_topk")
    x_BMD = rows.x[:300].float()
    expected_BF = own.encode(x_BMD).to_dense()
    assert 0.02 < float((expected_BF > 0).float().mean()) < 0.5
    torch.testing.assert_close(read.encode(x_BMD).to_dense(), expected_BF, rtol=0, atol=0)
    torch.testing.assert_close(read.decode(read.encode(x_BMD)), own.decode(own.encode(x_BMD)), rtol=0, atol=0)
    assert read.origin is not None and (read.origin.layer, read.origin.base.name) == (1, "organisation/base")


def test_the_card_says_what_the_run_says_and_names_no_path_of_this_machine(run: crossray.Run, tmp_path: Path) -> None:
    head, text = card_of(export(run, "batch_topk", tmp_path / "cc"))
    assert head["library_name"] == "crossray" and head["base_model"] == ["organisation/base"]
    summary = run.crosscoder_summary("batch_topk")
    for verdict, number in summary.verdicts.items():
        assert (f"| {verdict} | {number} |" in text) == (number > 0), verdict
    assert f"| {summary.fidelity['l0']:.1f} |" in text
    assert f"| {summary.fidelity['fve_base']:.3f}, {summary.fidelity['fve_chat']:.3f} |" in text
    assert "| layer | 1 |" in text and "organisation/base" in text and "| chat model | chat |" in text
    assert "/home/me" not in text
    (code,) = [block.removeprefix("python\n") for block in text.split("```")[1::2]]
    compile(code, "card", "exec")


def test_saelens_gives_the_runs_codes(run: crossray.Run, rows: Rows, tmp_path: Path) -> None:
    folder = export(run, "batch_topk", tmp_path / "sae", form="saelens")
    settings, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    x_BMD, own = rows.x[:300].float(), run.crosscoder("batch_topk")
    preact_BF = (x_BMD.flatten(1) - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    codes_BF = preact_BF.relu() * (preact_BF > tensors["threshold"])
    torch.testing.assert_close(codes_BF, own.encode(x_BMD).to_dense(), rtol=1e-5, atol=1e-5)
    assert settings["metadata"]["crossray_layer"] == 1 and "model_name" not in settings["metadata"]


def test_saelens_itself_reads_it(run: crossray.Run, rows: Rows, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    sae = sae_lens.SAE.load_from_disk(export(run, "batch_topk", tmp_path / "sae", form="saelens"))
    x_BMD, own = rows.x[:300].float(), run.crosscoder("batch_topk")
    codes_BF = sae.encode(x_BMD.flatten(1)).detach()
    torch.testing.assert_close(codes_BF, own.encode(x_BMD).to_dense(), rtol=1e-5, atol=1e-5)
    reconstruction = own.decode(own.encode(x_BMD)).flatten(1)
    torch.testing.assert_close(sae.decode(codes_BF).detach(), reconstruction, rtol=1e-5, atol=1e-5)
    half = sae_lens.SAE.load_from_disk(export(run, "batch_topk", tmp_path / "half", form="saelens", model="base"))
    assert half.cfg.d_in == own.activation_dim and half.cfg.metadata.model_name == "organisation/base"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"form": "onnx"}, "expected one of crossray, saelens"),
        ({"crosscoder": "l1"}, "expected one of batch_topk"),
        ({"model": "base"}, "for the forms saelens, neuronpedia"),
        ({"model": "third", "form": "saelens"}, "base or chat"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_is_written(
    run: crossray.Run, asked: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(crossray.InputError, match=message):
        export(run, **{"crosscoder": "batch_topk", "folder": tmp_path / "x", **asked})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_an_address_and_a_place_that_cannot_be_written_are_refused(
    run: crossray.Run, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "used", tmp_path / "file", "s3://bucket/x", tmp_path / "file" / "below", "a\0b"):
        with pytest.raises(crossray.InputError, match="expected a folder"):
            export(run, "batch_topk", target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "used"]


def test_a_form_that_fails_leaves_nothing(run: crossray.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_asked: object, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(forms.FORMS, "crossray", forms.Form(full, knows_models=False))  # type: ignore[arg-type]
    with pytest.raises(crossray.InputError, match="No space left"):
        export(run, "batch_topk", tmp_path / "cc")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_folder_and_says_where(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "made", "batch_topk", str(tmp_path / "cc"), "--root", str(root)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"folder   {tmp_path / 'cc'}\n"
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["export", "nobody", "l1", str(tmp_path / "x"), "--root", str(root)]) == 2


@pytest.mark.s3
def test_a_run_on_an_object_store_is_written_from_there(
    s3_root: str, write_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(f"{s3_root}/exports")
    run = crossray.open(f"{s3_root}/exports", "made")
    monkeypatch.setattr(delphi, "NUM_TOKENS", 32)
    for form in FORMS:
        assert (export(run, "batch_topk", tmp_path / form, form=form) / "README.md").is_file()
    read = crossray.Crosscoder.from_pretrained(tmp_path / "crossray")
    assert read.W_dec_FMD.equal(run.crosscoder("batch_topk").W_dec_FMD)


def test_names_that_hold_anything_stay_text(write_run: Any, tmp_path: Path) -> None:
    write_run(str(tmp_path / "runs"), name=HOSTILE, labels=(HOSTILE, HOSTILE))
    head, text = card_of(export(crossray.open(tmp_path / "runs", HOSTILE), "batch_topk", tmp_path / "cc"))
    assert head["library_name"] == "crossray"
    prose = "".join(text.split("```")[::2])
    assert "\\<script\\>" in prose and "\n# title" not in prose and "\u202e" not in prose
    assert "<script>" not in prose.replace("\\<script\\>", "") and "](" not in prose.replace("\\]\\(", "")
    tables = [line for line in prose.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables[:12]} == {3}


def test_text_for_markdown_and_yaml_is_escaped() -> None:
    assert plain("a|b<c>\n_d_") == "a\\|b\\<c\\>\u21b5\\_d\\_"
    values = {"title": 'x: "y" # z\n---\n', "tags": ["!!python/object", "- a"]}
    assert yaml.safe_load(front_matter(values).split("---\n", 1)[1].rsplit("---\n", 1)[0]) == values
