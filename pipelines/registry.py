"""Models by name in MLflow's registry: the best student of a sweep is its champion."""

from __future__ import annotations

import re

from mlflow.exceptions import MlflowException

from pipelines.tracking import TrackedRun, global_store

CHAMPION = "champion"
_DIGEST = "kd.weights"


def registered_name(sweep: str) -> str:
    """The model that the students of a sweep are versions of; MLflow takes no slash nor colon."""
    return re.sub(r"[^\w .-]", "-", sweep)


def registered_version(run: TrackedRun, name: str, digest: str) -> str | None:
    """The version that this run registered of these very weights, if it did before."""
    found = run.client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'")
    return next((str(held.version) for held in found if held.tags.get(_DIGEST) == digest), None)


def register_champion(run: TrackedRun, name: str, uri: str, *, card: str, digest: str) -> str:
    """Make a logged model the newest version and the champion of its name; returns the version.

    ``card`` is the version's description, ``digest`` that of its weights.
    """
    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with global_store(run.client.tracking_uri):  # where the registry looks for the model
        held = run.client.create_model_version(
            name,
            uri,
            run_id=run.run_id,
            model_id=uri.removeprefix("models:/"),
            tags={_DIGEST: digest},
            description=card,
        )
    run.client.set_registered_model_alias(name, CHAMPION, held.version)
    return str(held.version)
