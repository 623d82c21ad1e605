"""One Ray, one seed and one empty MLflow store for the whole suite."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true")
torch.set_num_threads(1)  # toy networks: two threads spend their time on each other
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)

CONFIGS = Path(__file__).parents[1] / "pipelines" / "configs"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray as `kd` starts it, once: code under test finds it running."""
    from pipelines.cluster import cluster

    with cluster():
        yield


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database after its migrations, which take seconds: every test copies it."""
    from mlflow.tracking import MlflowClient

    path: Path = tmp_path_factory.mktemp("mlflow") / "mlruns.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workdir(tmp_path: Path, _empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a store of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(_empty_store, tmp_path / "mlruns.db")
    return tmp_path


@pytest.fixture
def toy_run() -> Path:
    """A student of digits and its teacher, at the size of a test."""
    return Path(__file__).parent / "pipelines" / "toy.yaml"
