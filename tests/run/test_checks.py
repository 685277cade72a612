"""What a run refuses before it computes anything."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.cli import main
from pipeline.cluster.pools import Pool
from pipeline.config.resources import ResourcesSection
from pipeline.config.run_file import RunConfig, load
from pipeline.errors import InputError
from pipeline.planning.estimate import estimate_text
from pipeline.run import runner
from pipeline.run.checks import check_halves, check_local_resources, check_models
from pipeline.run.flow import build_flow
from pipeline.stages import halves
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter
from workloads.benchmarks.architectures import build

OFF = {"evidence": None, "logit_lens": None, "causality": None, "steering": None, "planted": None}
WRONG_UPPER = "zamba2"


@pytest.fixture
def run_file(random_model: Callable[..., Any], tokenizers: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """A run file for a model of some architecture as base and chat."""

    def write(architecture: str, **changes: Any) -> Path:
        folder = tmp_path / architecture
        model = random_model("llama", seed=0) if architecture == "llama" else build(architecture)
        if not folder.exists():
            model.save_pretrained(folder)
            tokenizers["gemma"].save_pretrained(folder)
        text = tmp_path / "text.jsonl"
        text.write_text("\n".join(json.dumps({"text": f"hello world {number}"}) for number in range(40)))
        source = {"source": str(folder)}
        tree = {
            "name": architecture,
            "models": {"base": source, "chat": {**source, "weight_noise": 0.01}, "dtype": "float32"},
            "corpus": {"sources": [{"name": "a", "kind": "jsonl", "paths": [str(text)], "text_column": "text"}]},
            "activations": {"layer": 1},
            "training": {"batch_rows": 64, "num_rows": 640},
            "crosscoders": [
                {"name": "a", "num_latents": 16, "lr_warmup_steps": 1, "sparsity": {"kind": "l1", "mu": 0.1}}
            ],
            "analyses": {"causality": None},
            "storage": {"root": str(tmp_path / "runs")},
            "tracking": {"kind": "none"},
            **changes,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def _missing(config: RunConfig) -> list[Any]:
    return [state.step for state in runner.inspect(config, Storage(config.storage.root))]


def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_pool(pool: Pool[Any, Any], items: list[Any]) -> list[Any]:
        worker = pool.worker(*pool.arguments)
        return [worker(item) for item in items]

    monkeypatch.setattr(halves, "run_pool", run_pool)


@pytest.mark.parametrize("analyses", [{"causality": None}, {**OFF, "causality": {}}], ids=["evidence", "causality"])
def test_an_upper_half_is_checked_where_an_analysis_needs_it(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, analyses: dict[str, Any], tmp_path: Path
) -> None:
    _in_this_process(monkeypatch)
    source = {"name": "a", "kind": "jsonl", "paths": [str(tmp_path / "text.jsonl")], "messages_column": "messages"}
    config = load(run_file(WRONG_UPPER, analyses=analyses, corpus={"sources": [source]}))
    with pytest.raises(InputError, match=r"logits continued from layer 1 .* Zamba2ForCausalLM"):
        check_halves(_missing(config), Storage(config.storage.root), config.resources, SilentReporter())


def test_an_upper_half_that_nobody_needs_may_be_wrong(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_this_process(monkeypatch)
    config = load(run_file(WRONG_UPPER, analyses=OFF))
    check_halves(_missing(config), Storage(config.storage.root), config.resources, SilentReporter())


def test_nothing_is_asked_about_models_where_no_step_needs_them(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halves, "run_pool", lambda *_: pytest.fail("the models were run"))
    config = load(run_file(WRONG_UPPER))
    done = [step for step in _missing(config) if step.key.stage not in ("activations", "evidence", "logit_lens")]
    check_halves(done, Storage(config.storage.root), config.resources, SilentReporter())


def test_an_end_that_is_no_norm_is_refused_before_any_work_where_tokens_are_named(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_pair(*arguments: Any, **options: Any) -> Any:
        pair = original(*arguments, **options)
        for decoder in pair.decoders:
            width = decoder.activation_dim
            decoder.base.norm = torch.nn.Sequential(decoder.base.norm, torch.nn.Linear(width, width))
        return pair

    _in_this_process(monkeypatch)
    original = halves.load_pair
    monkeypatch.setattr(halves, "load_pair", load_pair)
    for analyses in ({**OFF, "logit_lens": {}}, OFF):
        config = load(run_file("llama", analyses=analyses))
        if analyses is OFF:
            check_halves(_missing(config), Storage(config.storage.root), config.resources, SilentReporter())
            continue
        with pytest.raises(InputError, match=r"set analyses\.logit_lens to null"):
            check_halves(_missing(config), Storage(config.storage.root), config.resources, SilentReporter())


@pytest.mark.ray
@pytest.mark.rare
def test_a_run_refuses_an_architecture_before_any_text_is_read(
    run_file: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(run_file(WRONG_UPPER))]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("crossray: ")]
    assert "Zamba2ForCausalLM" in line
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"logs"}


def test_a_plan_says_what_is_wrong_with_local_models(run_file: Callable[..., Path], tmp_path: Path) -> None:
    config = load(run_file("llama"))
    storage = Storage(config.storage.root)
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"llama.*cannot be loaded"):
        estimate_text(config, runner.inspect(config, storage), storage)
    loading = build_flow(config).data.activations.inputs.loading
    with pytest.raises(InputError, match="cannot be loaded"):
        check_models(loading)
    assert not (tmp_path / "runs").exists()


ORGANISM: dict[str, Any] = {
    "organism": {"size": "tiny"},
    "models": {name: {"kind": "organism", "member": name} for name in ("base", "chat")},
    "corpus": {"sources": [{"name": "a", "kind": "organism", "part": "documents"}]},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({**ORGANISM, "activations": {"layer": 99}}, r"between 0 and 2 .*tiny.* layer 99"),
        ({"models": {"base": {"source": "x" * 300}, "chat": {"source": "y" * 300}}}, "xxx"),
        (
            {"analyses": {"causality": None, "steering": {"prompts_path": "{empty}", "latents": [0]}}},
            r"prompts_path: .*empty\.json",
        ),
    ],
    ids=["layer of an organism", "long name", "prompts"],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_what_would_fail_late_is_refused_by_plan_and_run(
    run_file: Callable[..., Path],
    tmp_path: Path,
    command: str,
    changes: dict[str, Any],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.json").write_text("[]")
    path = run_file("llama", **changes)
    path.write_text(path.read_text().replace("{empty}", str(tmp_path / "empty.json")))
    assert main([command, str(path)]) == 2
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_a_plan_says_where_nothing_of_a_source_can_be_used(run_file: Callable[..., Path], tmp_path: Path) -> None:
    source = {"name": "a", "kind": "jsonl", "paths": [str(tmp_path / "text.jsonl")], "text_column": "nope"}
    config = load(run_file("llama", corpus={"sources": [source]}))
    storage = Storage(config.storage.root)
    with pytest.raises(InputError, match=r"corpus 'a': 40 of 40 .*nope"):
        estimate_text(config, runner.inspect(config, storage), storage)


@pytest.mark.parametrize("architecture", ["mamba", "gemma3n_text", "gemma4_text"])
def test_a_plan_needs_the_width_alone(run_file: Callable[..., Path], architecture: str) -> None:
    tokens = {"num_tokens": 1000}
    config = load(run_file(architecture, tokens=tokens))
    storage = Storage(config.storage.root)
    assert "extraction" in estimate_text(config, runner.inspect(config, storage), storage)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"extraction": {"gpus": 99}}, r"resources\.extraction: .* got 99"),
        ({"analyses": {"gpus": 1, "workers": 99}}, r"resources\.analyses: .* got 99"),
        ({"tokens": {"workers": 10_000}}, r"resources\.tokens: .* got 10000"),
        ({"training": {"data": 64, "cpus": 64}}, r"resources\.training: .* got 4096"),
        ({"extraction": {"custom": {"fast": 1}}}, r"resources\.extraction: .* 0 fast .* got 1"),
    ],
    ids=["gpus", "gpu-workers", "workers", "ranks", "custom"],
)
def test_more_than_this_machine_has_is_refused_at_once_and_planned_with_a_remark(
    run_file: Callable[..., Path], resources: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.checks._is_joined", lambda: False)  # by the tests before, in this process
    config = load(run_file("llama", resources=resources, training={"batch_rows": 64, "num_rows": 640}))
    with pytest.raises(InputError, match=expected):
        check_local_resources(_missing(config), config.resources)
    with pytest.raises(InputError, match=expected):
        runner.run(config, SilentReporter())
    assert not Path(config.storage.root).exists()
    check_local_resources([], config.resources)
    joined = config.resources.model_copy(
        update={"cluster": config.resources.cluster.model_copy(update={"address": "auto"})}
    )
    check_local_resources(_missing(config), joined)


def test_default_resources_fit_every_machine(run_file: Callable[..., Path]) -> None:
    check_local_resources(_missing(load(run_file("llama"))), ResourcesSection())
