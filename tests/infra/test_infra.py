"""Deployment files: accepted by Ray's own schema, and free of the mistakes that it lets pass."""

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import main

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"
NODE_TYPE_KEYS = {"min_workers", "max_workers", "resources", "labels", "node_config", "docker", "worker_setup_commands"}


def launcher() -> dict[str, Any]:
    cluster: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return cluster


def check_launcher(cluster: dict[str, Any]) -> None:
    """Ray's own validation, and what it does not look at."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types, cluster["head_node_type"]
    for name, node in types.items():
        assert set(node) <= NODE_TYPE_KEYS, f"{name}: {set(node) - NODE_TYPE_KEYS}"
        if name != cluster["head_node_type"]:
            assert 0 <= node["min_workers"] <= node["max_workers"] <= cluster["max_workers"], name


def test_the_launcher_file_is_valid() -> None:
    cluster = launcher()
    check_launcher(cluster)
    types = cluster["available_node_types"]
    gpus = {name: node for name, node in types.items() if node["resources"].get("GPU")}
    assert any("InstanceMarketOptions" in node["node_config"] for node in gpus.values()), "no spot workers with GPUs"
    assert types["head"]["resources"] == {"CPU": 0}
    start = " ".join(cluster["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in start and "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("head_node_type",), "haed", "head_node_type"),
        (("max_wokers",), 3, "max_wokers"),
        (("available_node_types", "gpu", "min_workers"), 99, "sum of `min_workers`"),
        (("available_node_types", "gpu", "min_wokers"), 1, "min_wokers"),
        (("provider", "type"), None, "node provider"),
    ],
    ids=["head type", "top-level key", "min above max", "node type key", "no provider"],
)
def test_mistakes_in_the_launcher_file_are_caught(path: tuple[str, ...], value: Any, message: str) -> None:
    cluster = launcher()
    place = cluster
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(Exception, match=message):
        check_launcher(cluster)


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template's spec below a value."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for item in value.values():
            yield from pods(item)
    elif isinstance(value, list):
        for item in value:
            yield from pods(item)


KUBERNETES = [
    INFRA / "kuberay" / "cluster.yaml",
    INFRA / "kuberay" / "job.yaml",
    INFRA / "services" / "kubernetes.yaml",
]


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_pods_run_without_privileges_and_with_limits(path: Path) -> None:
    found = list(pods(documents(path)))
    assert found
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
        for container in pod["containers"]:
            assert set(container["resources"]) == {"limits", "requests"}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            for variable in container.get("env", []):
                assert not ("PASSWORD" in variable["name"] and "value" in variable), "a password in a file"


def ray_clusters() -> Iterator[dict[str, Any]]:
    (cluster,) = documents(INFRA / "kuberay" / "cluster.yaml")
    (job,) = documents(INFRA / "kuberay" / "job.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    yield cluster["spec"]
    yield job["spec"]["rayClusterSpec"]


def test_kuberay_clusters_have_the_pinned_ray_and_sane_ranges() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    for spec in ray_clusters():
        assert f"ray=={spec['rayVersion']}" == pinned
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], group["groupName"]


def test_stages_ask_for_nothing_by_name_that_no_node_offers() -> None:
    """In the command of infra/README.md and in the headers of the pairs; where a stage needs GPUs, nodes have them."""
    asked = {
        (stage, name)
        for path in [INFRA / "README.md", *(ROOT / "workloads" / "pairs").glob("*.yaml")]
        for stage, name in re.findall(r"resources\.(\w+)\.custom=\{(\w+): \d+\}", path.read_text())
    }
    assert {stage for stage, _ in asked} == {"tokens", "extraction", "training"}
    launched = [node["resources"] for node in launcher()["available_node_types"].values()]
    (cluster,) = documents(INFRA / "kuberay" / "cluster.yaml")
    pods = [
        {**json.loads(json.loads(group["rayStartParams"]["resources"])), **_limits(group)}
        for group in cluster["spec"]["workerGroupSpecs"]
    ]
    for offered in (launched, pods):
        for stage, name in asked:
            found = [node for node in offered if name in node]
            assert found, name
            assert all(node["CPU" if stage == "tokens" else "GPU"] == node[name] for node in found), (stage, name)


def _limits(group: dict[str, Any]) -> dict[str, int]:
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    return {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0))}


def test_entrypoints_are_commands_that_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = documents(INFRA / "kuberay" / "job.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "pipeline"]
    words[words.index("/run/run.yaml")] = str(tmp_path / "absent.yaml")
    assert main(words[3:]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_services_publish_ports_on_loopback_alone_and_hold_no_password() -> None:
    (compose,) = documents(INFRA / "services" / "compose.yaml")
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "SECRET" in name:
                assert str(value).startswith("${"), name


def test_the_image_copies_what_is_there() -> None:
    lines = (INFRA / "image" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert any(line.startswith("USER ") and line != "USER root" for line in lines)
