"""The only file that knows MLflow: runs, numbers, students. The driver calls it, no worker does."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
import numpy as np
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.tracking import MlflowClient

from pipelines.models import Served

EXPERIMENT = "kdsweep"
COMMIT = "mlflow.source.git.commit"
DEFAULT_STORE = Path("mlruns.db")
DEFAULT_ARTIFACTS = Path("mlruns")


# MLflow takes no longer ones
_DIGEST_CHARACTERS = 36
# of the comparison that the UI is asked for: its address has 35 characters for each
_RUNS_COMPARED = 100


@dataclass(frozen=True)
class TrackedInput:
    """Something that a run was trained on."""

    name: str
    digest: str  # its first 36 characters are kept
    source: str  # where it came from
    context: str  # what it is to the run: training, or the cache of a teacher


@dataclass(frozen=True)
class TrackedRun:
    """One MLflow run, addressed by its id: nothing here is global."""

    client: MlflowClient
    run_id: str
    last_epoch: int = 0  # already logged, where an earlier call was broken off

    def log(self, metrics: Mapping[str, float], *, epoch: int) -> None:
        now = int(time.time() * 1000)
        entities = [Metric(name, value, now, epoch) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=entities)

    def tag(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(
            self.run_id, tags=[RunTag(name, value) for name, value in tags.items()]
        )

    def log_inputs(self, inputs: Iterable[TrackedInput]) -> None:
        """Say what the run was trained on; the same again changes nothing."""
        entities = [
            DatasetInput(
                Dataset(
                    held.name,
                    held.digest[:_DIGEST_CHARACTERS],
                    source_type="local",
                    source=json.dumps({"uri": held.source}),
                ),
                [InputTag("mlflow.data.context", held.context)],
            )
            for held in inputs
        ]
        self.client.log_inputs(self.run_id, datasets=entities)

    def end(self, status: str) -> None:
        """``status`` is FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.end("FINISHED")
        else:
            self.end("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def log_artifact(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))

    def log_student(self, student: Served, example: np.ndarray) -> str:
        """Log a network as an MLflow model that loads without this package; returns its URI.

        ``example`` is (B, C, H, W) uint8 with B >= 2; the model takes any B.
        """
        student = student.cpu().eval()
        with torch.inference_mode():
            logits = student(torch.from_numpy(example)).numpy()
        with _quiet(), global_store(self.client.tracking_uri), mlflow.start_run(run_id=self.run_id):
            info = mlflow.pytorch.log_model(
                student,
                name="student",
                signature=infer_signature(example, logits),
                input_example=example,
                pip_requirements=[f"torch=={version('torch')}", f"numpy=={version('numpy')}"],
            )
        return str(info.model_uri)


class Tracker:
    """The store of all runs: ``MLFLOW_TRACKING_URI``, or sqlite in the working directory."""

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or store_uri()
        if self.uri.startswith("http") and "@" in urlsplit(self.uri).netloc:
            raise ValueError(
                "MLFLOW_TRACKING_URI holds a password, which MLflow repeats in its messages; give "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        try:
            with _quiet():
                self.client = MlflowClient(self.uri)
                self.experiment_id = self._experiment()
        except MlflowException as error:
            raise ValueError(
                f"MLflow cannot use the store {without_password(self.uri)}: {error}"
            ) from None

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        local = self.uri.startswith("sqlite:")
        place = DEFAULT_ARTIFACTS.absolute().as_uri() if local else None
        return str(self.client.create_experiment(EXPERIMENT, artifact_location=place))

    def start(
        self,
        name: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: TrackedRun | None = None,
    ) -> TrackedRun:
        """The run of this name under ``parent``, or a new one with parameters by dotted path.

        Names carry the digest of what is run, so that the same is logged once, however often it is
        called for or taken up again.
        """
        above = parent.run_id if parent else ""
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.`mlflow.runName` = '{name}' and tags.`kd.parent` = '{above}'",
            max_results=1,
        )
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            last = int(found[0].data.metrics.get("epoch", 0))
            return TrackedRun(self.client, found[0].info.run_id, last)
        nested = {"mlflow.parentRunId": above} if parent else {}
        created = self.client.create_run(
            self.experiment_id,
            run_name=name,
            tags={**commit(), **nested, "kd.parent": above, **tags},
        )
        run = TrackedRun(self.client, created.info.run_id)
        flat = [Param(path, str(value)[:6000]) for path, value in dotted(params)]
        for start in range(0, len(flat), 100):  # MLflow takes no more at a time
            self.client.log_batch(run.run_id, params=flat[start : start + 100])
        return run


def comparison_address(tracker: Tracker, server: str) -> str:
    """Where a server of the store shows the runs of the last sweep side by side.

    The list of all runs where there was no sweep yet.
    """
    experiment = tracker.experiment_id
    sweeps = tracker.client.search_runs(
        [experiment], "tags.`kd.kind` = 'sweep'", max_results=1, order_by=["start_time DESC"]
    )
    if not sweeps:
        return f"{server}/#/experiments/{experiment}"
    trials = tracker.client.search_runs(
        [experiment],
        f"tags.`kd.parent` = '{sweeps[0].info.run_id}'",
        max_results=_RUNS_COMPARED,
        order_by=["start_time ASC"],
    )
    runs, experiments = (
        quote(json.dumps(ids, separators=(",", ":")), safe="[],")
        for ids in ([trial.info.run_id for trial in trials], [experiment])
    )
    return f"{server}/#/compare-runs?runs={runs}&experiments={experiments}"


def store_uri() -> str:
    """Where runs are tracked."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_STORE.absolute()}"


def without_password(uri: str) -> str:
    """A store's address for people to read."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def dotted(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, and of lists of them, with their dotted paths."""
    if isinstance(content, list) and any(isinstance(one, Mapping) for one in content):
        content = {str(place): one for place, one in enumerate(content)}
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from dotted(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, content


def commit() -> dict[str, str]:
    """The git commit of the working directory as a tag, marked where there are changes on it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {COMMIT: found.stdout.strip()}


@contextmanager
def global_store(uri: str) -> Iterator[None]:
    """MLflow's models know only its global store, which it keeps in the environment: lend ours."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No migration chatter from MLflow and its database library."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
