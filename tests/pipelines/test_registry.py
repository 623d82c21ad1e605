"""The best student by its name: loaded and served by MLflow, it names a real digit."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

from pipelines.datasets import DataConfig
from pipelines.models import Served
from pipelines.registry import register_champion, registered_name, registered_version
from pipelines.sources import Pictures, read_pictures
from pipelines.tracking import TrackedRun, Tracker
from tests.pipelines.servers import free_port, serving

CARD = "# Best student\n\nof a test"


@pytest.fixture
def digits() -> Pictures:
    return read_pictures(DataConfig(name="digits"), "test")


@pytest.fixture
def champion(workdir: Path, digits: Pictures) -> TrackedRun:
    run = Tracker().start("sweep-1", params={}, tags={})
    uri = run.log_student(nearest_mean(digits), digits.image[:2])
    register_champion(run, "toys", uri, card=CARD, digest="beef")
    return run


def nearest_mean(pictures: Pictures) -> Served:
    """Names the class whose mean picture is nearest: linear in the pixels, with nothing to train.

    Of |x - m|^2 the part that differs by class is -2 (x m - |m|^2 / 2).
    """
    rows = pictures.image.reshape(len(pictures.image), -1) / 255
    means = np.stack([rows[pictures.label == label].mean(axis=0) for label in range(10)])
    linear = nn.Linear(64, 10)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(means))
        linear.bias.copy_(torch.from_numpy(-(means**2).sum(axis=1) / 2))
    return Served(nn.Sequential(nn.Flatten(), linear), mean=(0.0,), std=(1.0,))


def a_digit_of_each(pictures: Pictures) -> np.ndarray:
    """The picture of every class that is told apart from other classes by the widest margin."""
    with torch.inference_mode():
        logits = nearest_mean(pictures)(torch.from_numpy(pictures.image)).numpy()
    margin = logits - np.sort(logits, axis=1)[:, [-2]]
    margin[np.arange(10) != pictures.label[:, None]] = -np.inf
    return margin.argmax(axis=0)


def test_the_champion_is_loaded_by_its_name_and_names_real_digits(
    champion: TrackedRun, digits: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", champion.client.tracking_uri)
    model = mlflow.pyfunc.load_model("models:/toys@champion")
    rows = a_digit_of_each(digits)
    predicted = model.predict(digits.image[rows]).argmax(axis=1)
    assert predicted.tolist() == digits.label[rows].tolist() == list(range(10))
    held = champion.client.get_model_version_by_alias("toys", "champion")
    assert held.description == CARD
    assert held.run_id == champion.run_id


def test_other_weights_are_a_new_version_and_the_same_are_found_again(
    champion: TrackedRun, digits: Pictures
) -> None:
    assert registered_version(champion, "toys", "beef") == "1"
    assert registered_version(champion, "toys", "cafe") is None
    assert registered_version(champion, "unknown", "beef") is None
    uri = champion.log_student(nearest_mean(digits), digits.image[:2])
    assert register_champion(champion, "toys", uri, card="newer", digest="cafe") == "2"
    held = champion.client.get_model_version_by_alias("toys", "champion")
    assert (str(held.version), held.description) == ("2", "newer")


@pytest.mark.parametrize("name", ["a/b", "c:d", "it's"])
def test_any_name_of_a_sweep_makes_a_name_of_a_model(name: str) -> None:
    assert registered_name(name) == f"{name[:-2]}-{name[-1]}"


@pytest.mark.slow
def test_a_served_champion_answers_with_the_class_of_a_real_picture(
    champion: TrackedRun, digits: Pictures
) -> None:
    rows = a_digit_of_each(digits)
    port = free_port()
    with served("models:/toys@champion", champion.client.tracking_uri, port):
        body = json.dumps({"inputs": digits.image[rows].tolist()}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            body,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            logits = json.loads(answer.read())["predictions"]
    assert np.argmax(logits, axis=1).tolist() == list(range(10))


@contextmanager
def served(model: str, store: str, port: int) -> Iterator[None]:
    """``mlflow models serve`` on this machine, until the block ends."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # the server starts uvicorn by its name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "PATH": path}
    with serving(command, f"http://127.0.0.1:{port}/ping", environment=environment):
        yield
