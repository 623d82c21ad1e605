"""What Ray Tune is told of this process, and what not."""

from __future__ import annotations

import pytest
from ray.tune.execution import class_cache

from pipelines.trials import secrets_kept


class Work:
    """A trainable class, as far as Tune looks at it here."""


def handed_over() -> str:
    """The settings with which Tune would start an actor."""
    return str(class_cache._ActorClassCache().get(Work)._default_options["runtime_env"])


def test_tune_hands_its_actors_no_key_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    before = set(class_cache.ENV_VARS_TO_PROPAGATE)
    assert "planted" in handed_over()  # or there is nothing to be kept any more
    with secrets_kept():
        assert "planted" not in handed_over()
    assert before == class_cache.ENV_VARS_TO_PROPAGATE
