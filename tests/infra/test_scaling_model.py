"""The simulator behind infra/SCALING.md: arithmetic against closed forms, and the page against what it prints."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

INFRA = Path(__file__).parent.parent.parent / "infra"


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_model", INFRA / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_model"] = module
    spec.loader.exec_module(module)
    return module


def test_extraction_is_the_slowest_of_its_resources(model: ModuleType) -> None:
    pair = model.Pair("x", width=1000, layers=10, parameters_per_layer=1e6, expansion=2)
    c = model.Constants(gpu_flops=1e12, gpu_share=0.5)
    stage = model.extraction(pair, 16, 50_000_000, c)
    assert stage.busy["GPU compute"] == pytest.approx(2 * 2 * 1e6 * 10 * 50e6 / (16 * 0.5e12))
    num_bytes = 50e6 * 2 * 1000 * 2
    assert stage.busy["network of nodes"] == pytest.approx(num_bytes / (2 * 25e9))
    assert stage.busy["driver"] == pytest.approx(1000 * c.driver_seconds_per_shard)
    assert stage.seconds == max(stage.busy.values()) and stage.busy[stage.bound] == stage.seconds


def test_training_on_one_gpu_exchanges_nothing(model: ModuleType) -> None:
    pair = model.PAIRS[0]
    c = model.Constants()
    busy = model.training(pair, 1, 1_024_000, c).busy
    steps, weights = 1000, 2 * 2 * 2304 * 32 * 2304
    products = 1.41 * 2 * 2048 * 2 * 2304 * 32 * 2304 / (989e12 * 0.4)
    assert busy["GPU"] == pytest.approx(steps * (products + 32 * weights / 3.35e12))
    assert busy["links in a node"] == 0
    assert busy["network of nodes"] == pytest.approx(2 * 1_024_000 * 9216 / 25e9)


def test_more_gpus_never_slow_a_run(model: ModuleType) -> None:
    c = model.Constants()
    for pair in model.PAIRS:
        for stage in (model.extraction, lambda *own: model.training(own[0], model.training_gpus(*own), *own[2:])):
            seconds = [stage(pair, n, model.ROWS, c).seconds for n in (1, 2, 8, 64, 512, 1000)]
            assert seconds == sorted(seconds, reverse=True)


def test_the_page_holds_what_the_simulator_prints(model: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main([]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (INFRA / "SCALING.md").read_text().splitlines()
    assert len(printed) > 15
    assert not [line for line in printed if line not in page]
