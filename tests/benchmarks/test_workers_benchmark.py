"""The workers benchmark counts what it says: rates without start-up, ratios by round, processor time by role."""

import os
import subprocess
import sys
import time

import pytest

from workloads.benchmarks import driver_memory, processes, workers, workers_contenders


def test_a_worker_s_first_shard_is_start_up_and_workers_add_up() -> None:
    shards = [
        {"worker": name, "ended": ended, "tokens": 100.0} for name in ("a", "b") for ended in (50.0, 52.0, 54.0, 56.0)
    ]
    assert workers_contenders.own_rates(shards) == {"rate": 2 * 300 / 6, "workers": 2}
    assert workers_contenders.own_rates(shards[:1])["rate"] == 0


def test_the_rate_of_a_curve_is_that_between_its_points_and_the_first_step_is_found_by_it() -> None:
    curve = [{"step": 4.0, "time_ms": 12_000.0}, {"step": 8.0, "time_ms": 14_000.0}]
    assert workers_contenders.curve_rate(curve, batch_rows=100) == {"rate": 200.0, "first_step": 10.0}


def test_ratios_are_taken_within_rounds_and_bare_contenders_have_their_own_yardstick() -> None:
    stage = {"ray_init": 2.0, "pool": 3.0, "wall": 8.0, "items": 100, "cpu": dict.fromkeys(processes.ROLES, 1.0)}
    readings = {
        "1 worker": [{**stage, "rate": rate} for rate in (10.0, 20.0, 40.0)],
        "2 workers": [{**stage, "rate": rate} for rate in (19.0, 38.0, 40.0)],
        "bare: 1 process": [{"rate": 5.0}] * 3,
        "bare: 2 processes": [{"rate": 9.0}] * 3,
    }
    assert workers.ratio(readings, "2 workers", "1 worker") == 1.9
    table = workers.table("extraction", readings)
    assert "| 2 workers | 38 | 1.90 | 2.0 s | 3.0 s | 8.0 s | 10 | 1.0, 1.0" in table
    assert "| bare: 2 processes | 9 | 1.80 |" in table


def test_contenders_are_chosen_by_name() -> None:
    chosen = workers.contenders(workers.Case(), ["2 workers", "bare: 2 processes"])
    names = {part: [contender.name for contender in own] for part, own in chosen.items()}
    assert names == {"extraction": ["2 workers", "bare: 2 processes"], "training": ["bare: 2 processes"]}


def test_the_processor_time_and_memory_of_a_child_process_are_seen() -> None:
    code = "import time; held = bytearray(b'1') * 50_000_000; end = time.process_time() + 0.3\n"
    code += "while time.process_time() < end: pass\n"
    code += "print('done', flush=True); input()"
    with processes.Watch(interval=0.05) as watch:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        assert child.pid in processes.descendants(os.getpid())
        time.sleep(0.1)
        child.communicate(b"\n")
    assert watch.cpu_seconds()["helpers"] >= 0.2
    assert max(sample.memory_bytes["helpers"] for sample in watch.samples) > 45_000_000
    assert watch.memory_bytes(0.5)["driver"] > 1_000_000


@pytest.mark.campaign
@pytest.mark.ray
def test_contenders_of_every_kind_give_a_reading_at_a_tiny_size() -> None:
    """The other contenders are these with other numbers."""
    only = ["2 workers", "bare: 2 processes", "2 latent ranks", "bare: 2, half the latents"]
    case = workers.Case(
        extraction_width=32,
        layers=2,
        shards=6,
        shard_tokens=300,
        training_width=32,
        latents=64,
        k=4,
        batch_rows=64,
        steps=12,
        stored_rows=1000,
        bare_seconds=0.2,
        copies=1,
    )
    said: list[str] = []
    readings = workers.run(case, ("extraction", "training"), 1, said.append, only)
    assert sorted(name for own in readings.values() for name in own) == sorted([*only, "bare: 2 processes"])
    for own in readings.values():
        for name, (reading,) in own.items():
            assert reading["rate"] > 0, name
            if not name.startswith("bare"):
                assert 0 < reading["pool"] < reading["wall"]
                assert reading["cpu"]["workers"] > 0
    assert readings["extraction"]["2 workers"][0]["workers"] == 2
    assert any("| 2 latent ranks |" in text for text in said)


@pytest.mark.campaign
@pytest.mark.ray
def test_the_memory_of_driver_and_head_is_read(tmp_path) -> None:
    driver_memory.build_inputs(tmp_path, width=32, copies=1)
    path = driver_memory.run_file(tmp_path, num_shards=4, shard_rows=300)
    command = [sys.executable, "-W", "ignore", "-m", "workloads.benchmarks.driver_memory", "--measure", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '"gcs": [' in done.stdout
