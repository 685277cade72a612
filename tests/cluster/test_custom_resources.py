"""Stages that ask nodes for what they offer by name: placed on those nodes alone, refused where there are none."""

from pathlib import Path

import pytest
from clusters import Nodes
from runs import Finished, copied, has_checkpoint, run_file, start, wait_for

from pipeline.cluster import connect as cluster
from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.resources import ExtractionResources, TrainingResources, WorkersSection
from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.planning.estimate import estimate_text
from pipeline.run.runner import inspect
from pipeline.storage.filesystem import Storage

CUSTOM = {"tokens": {"tokenise": 1}, "extraction": {"extract": 1}, "training": {"train": 0.5}}


class Nothing:
    """A worker that is never made."""


@pytest.mark.parametrize("section", [WorkersSection, ExtractionResources])
def test_a_cluster_without_the_named_resource_is_one_line(
    ray_cluster: None, section: type[WorkersSection | ExtractionResources]
) -> None:
    pool = Pool("extraction", section(cpus=0.5, custom={"extract": 2}), Nothing, ())
    with pytest.raises(InputError) as caught:
        list(run_pool(pool, [{}, {}]))
    assert str(caught.value) == (
        "resources.extraction: expected at most the cluster's 0 of the custom resource 'extract', got 2 (1 workers); "
        "ask for less or start more nodes that offer it (ray start --resources '{\"extract\": 1}')"
    )


def test_what_one_worker_asks_for_names_every_resource() -> None:
    ranks = TrainingResources(gpus=0.5, custom={"train": 1})
    assert cluster.request(ranks, 2.0) == {"CPU": 2.0, "GPU": 0.5, "train": 1}
    assert cluster.request(WorkersSection(), 1.0) == {"CPU": 1.0}


def test_the_plan_names_what_nodes_must_offer_and_no_identity_knows_it(tmp_path: Path) -> None:
    resources = {stage: {"custom": custom} for stage, custom in CUSTOM.items()}
    plain = load(run_file(tmp_path, str(tmp_path)))
    asking = load(run_file(tmp_path, str(tmp_path), resources=resources))
    storage = Storage(str(tmp_path))
    states = inspect(asking, storage)
    assert [state.step.key for state in states] == [state.step.key for state in inspect(plain, storage)]
    (line,) = [line for line in estimate_text(asking, states, storage).splitlines() if "nodes" in line]
    assert line == (
        "  nodes        tokens where nodes offer 1 tokenise per worker; extraction where nodes offer 1 extract per "
        "worker; training where nodes offer 0.5 train per worker"
    )


def test_a_worker_asks_for_cpus_that_no_node_has_yet_where_nodes_come_on_demand(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.worker_cpus(64.0) == 2.0
    monkeypatch.setattr(cluster, "_autoscales", True)
    assert cluster.worker_cpus(64.0) == 64.0
    cluster.check_fits("extraction", {"CPU": 64.0, "extract": 1.0}, 3)


def test_asks_of_two_stages_together_are_held_against_the_cluster_and_not_against_one_node(ray_cluster: None) -> None:
    cluster.check_total("training with resources.extraction", {"CPU": 2.0}, 4)
    with pytest.raises(InputError, match=r"2 CPUs.* 3 \(4 workers\)"):
        cluster.check_total("training with resources.extraction", {"CPU": 3.0}, 4)


@pytest.mark.ray
@pytest.mark.rare
def test_every_stage_works_on_the_nodes_that_offer_what_it_asks_for(finished: Finished, tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, head_cpus=0)
    try:
        extracting = nodes.add_node(num_cpus=2, resources={"tokenise": 2, "extract": 1})
        training = nodes.add_node(num_cpus=2, resources={"train": 1})
        root = copied(finished, tmp_path, "organism", "corpus")
        resources = {stage: {"custom": custom} for stage, custom in CUSTOM.items()}
        resources["training"] |= {"checkpoint_every_steps": 20, "cpus": 1}
        resources["cluster"] = {"address": f"127.0.0.1:{nodes.gcs}"}
        path = run_file(tmp_path, str(root), resources=resources, tracking={"kind": "none"})
        process = start(path, RAY_AUTH_MODE="disabled")
        wait_for(lambda: any(root.glob("activations/*/*.safetensors.json")), process)
        assert nodes.with_process("MapWorker") == [extracting]
        wait_for(lambda: has_checkpoint(root), process)
        assert nodes.with_process("RayTrainWorker") == [training]
        process.kill()
        process.wait()
    finally:
        nodes.close()
