"""What a cluster can hold, and who may join one."""

from __future__ import annotations

import pytest
import ray

from pipelines import cluster as clusters
from pipelines.cluster import cluster, gpus_there, worker_resources, workers_at_once


def has(monkeypatch: pytest.MonkeyPatch, there: dict[str, float], grown: dict | None) -> None:
    """A cluster that has some nodes, and may ask for others."""
    state = ray._private.state.state
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: grown)


def test_nodes_that_come_when_they_are_asked_for_count(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, {"memory": 8e9}, {"CPU": 64, "GPU": 8})
    assert (gpus_there(), workers_at_once()) == (8, 8)
    assert worker_resources() == {"CPU": 1, "GPU": 1}


@pytest.mark.parametrize("grown", [None, {}, {"CPU": 0}])
def test_a_cluster_that_does_not_grow_has_what_is_there(
    monkeypatch: pytest.MonkeyPatch, grown: dict | None
) -> None:
    has(monkeypatch, {"CPU": 6 + clusters.SPARE_CPUS}, grown)
    assert (gpus_there(), workers_at_once()) == (0, 6)
    assert worker_resources() == {"CPU": 1}


def test_a_cluster_is_not_joined_by_what_a_home_directory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it was asked"))
    with (
        pytest.raises(ValueError, match="expected the cluster's token in RAY_AUTH_TOKEN"),
        cluster(),
    ):
        pass
