"""What clusters/ ships is what its readers take: each file by the schema of who reads it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.clusters.schemas import COMPOSE, KUBERAY

CLUSTERS = Path(__file__).parents[2] / "clusters"
CLOUDS = sorted(CLUSTERS.glob("cloud/*.yaml"))
MANIFESTS = sorted(CLUSTERS.glob("kuberay/*.yaml"))
COMPOSED = CLUSTERS / "mlflow" / "compose.yaml"
TEXTS = [path for path in sorted(CLUSTERS.glob("**/*")) if path.is_file()]
Broken = Callable[[dict[str, Any]], object]


def manifests(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """The specification of a RayCluster or of the one in a RayJob."""
    spec: dict[str, Any] = manifest["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_cluster(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def check_manifest(manifest: dict[str, Any]) -> None:
    version = kubernetes_validate.latest_version()
    if manifest["kind"] not in KUBERAY:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.validate(manifest, KUBERAY[manifest["kind"]])
    for template in pod_templates(manifest):
        held = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "held"}}
        kubernetes_validate.validate({**held, "template": template}, version, strict=True)


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_ray_s_launcher_takes_the_file(path: Path) -> None:
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    workers = config["available_node_types"]["spot_gpu"]
    assert workers["min_workers"] == 0
    assert workers["max_workers"] > 0


LAUNCHER_FAULTS: dict[str, Broken] = {
    "an unknown key": lambda config: config.update(max_worker=3),
    "a wrong type": lambda config: config.update(max_workers="many"),
    "a head of no type": lambda config: config.update(head_node_type="heed"),
}


@pytest.mark.parametrize("fault", LAUNCHER_FAULTS)
@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_ray_s_launcher_refuses_a_broken_file(path: Path, fault: str) -> None:
    config = yaml.safe_load(path.read_text())
    LAUNCHER_FAULTS[fault](config)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_a_cloud_s_ray_asks_for_a_token_and_shows_no_dashboard(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    for role in ("head", "worker"):
        (start,) = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ray/ray_token" in start
        assert ("--dashboard-host=127.0.0.1" in start) == (role == "head")
    opened = config["provider"].get("security_group", {})
    assert "IpPermissions" not in opened, "a port was opened to the world"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_the_manifest(path: Path) -> None:
    for manifest in manifests(path):
        check_manifest(manifest)


RAY_FAULTS: dict[str, Broken] = {
    "a typo": lambda spec: spec.update(enableInTreeAutoscalling=True),
    "a wrong type": lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"),
    "an unknown way to ask for a token": lambda spec: spec["authOptions"].update(mode="tokens"),
    "a number among the start parameters": lambda spec: spec["headGroupSpec"].update(
        rayStartParams={"num-cpus": 0}
    ),
    "a typo in a pod": lambda spec: spec["headGroupSpec"]["template"]["spec"].update(container=[]),
    "a wrong type in a pod": lambda spec: spec["headGroupSpec"]["template"]["spec"].update(
        volumes="shared"
    ),
}


@pytest.mark.parametrize("fault", RAY_FAULTS)
@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_a_broken_manifest_of_ray_is_refused(name: str, fault: str) -> None:
    (manifest,) = manifests(CLUSTERS / "kuberay" / name)
    check_manifest(manifest)
    broken = copy.deepcopy(manifest)
    RAY_FAULTS[fault](broken["spec"].get("rayClusterSpec", broken["spec"]))
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_manifest(broken)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_ray_on_kubernetes_asks_for_a_token_and_scales_workers_with_gpus(name: str) -> None:
    (manifest,) = manifests(CLUSTERS / "kuberay" / name)
    cluster = ray_cluster(manifest)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert workers["maxReplicas"] > workers["minReplicas"]


def test_the_job_s_cluster_is_the_cluster_that_stays() -> None:
    (cluster,), (job,) = (
        manifests(CLUSTERS / "kuberay" / f"{name}.yaml") for name in ("raycluster", "rayjob")
    )
    assert ray_cluster(cluster) == ray_cluster(job)


def test_compose_takes_the_file_and_only_this_machine_hears_it() -> None:
    content = yaml.safe_load(COMPOSED.read_text())
    jsonschema.validate(content, COMPOSE)
    named = set(content["services"])
    for service in content["services"].values():
        assert set(service.get("depends_on", {})) <= named
        mounted = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert mounted <= set(content["volumes"])


COMPOSE_FAULTS: dict[str, Broken] = {
    "a typo": lambda service: service.update(enviroment={}),
    "a port for everyone": lambda service: service.update(ports=["5000:5000"]),
    "a wrong type": lambda service: service.update(command={}),
}


@pytest.mark.parametrize("fault", COMPOSE_FAULTS)
def test_a_broken_compose_file_is_refused(fault: str) -> None:
    content = yaml.safe_load(COMPOSED.read_text())
    COMPOSE_FAULTS[fault](content["services"]["mlflow"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, COMPOSE)


def images() -> Iterator[str]:
    for path in TEXTS:
        for line in path.read_text().splitlines():
            if found := re.match(r"\s*(?:-\s+)?(?:image:|FROM)\s+(\S+)", line):
                yield found[1]


def test_every_image_has_a_version_and_no_registry() -> None:
    found = list(images())
    assert len(found) >= 8
    for image in found:
        name, _, version = image.rpartition(":")
        assert re.search(r"\d+\.\d+|\d{4}-\d\d-\d\d", version), image
        assert "." not in name.split("/")[0], f"{image} names a registry"


def secrets_in(content: Any, path: str = "") -> Iterator[str]:
    """Places that hold the value of a secret rather than a reference to it."""
    if isinstance(content, dict):
        named = content.get("name")
        if isinstance(named, str) and looks_secret(named) and "value" in content:
            yield f"{path}.{named}"
        for key, value in content.items():
            refers = isinstance(value, str) and value.startswith(("${", "~/"))
            if looks_secret(str(key)) and isinstance(value, str) and not refers:
                yield f"{path}.{key}"
            yield from secrets_in(value, f"{path}.{key}")
    elif isinstance(content, list):
        for place, value in enumerate(content):
            yield from secrets_in(value, f"{path}.{place}")


def looks_secret(name: str) -> bool:
    return bool(re.search(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY|_KEY)(_ID)?$", name, re.IGNORECASE))


@pytest.mark.parametrize("path", [*CLOUDS, *MANIFESTS, COMPOSED], ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    for content in manifests(path):
        assert not list(secrets_in(content))
        assert content.get("kind") != "Secret"


def test_a_planted_secret_is_found() -> None:
    (manifest,) = manifests(CLUSTERS / "kuberay" / "raycluster.yaml")
    (container,) = pod_templates(manifest)[0]["spec"]["containers"]
    container["env"].append({"name": "RAY_AUTH_TOKEN", "value": "abc"})
    composed = yaml.safe_load(COMPOSED.read_text())
    composed["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"] = "abc"
    assert len(list(secrets_in(manifest))) == 1
    assert len(list(secrets_in(composed))) == 1
