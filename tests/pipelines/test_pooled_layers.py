"""Layers of which a run reads less than all: what each loss takes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from kdcore.losses import LOSSES
from pipelines.build import build_step
from pipelines.config import RunConfig
from pipelines.sources import read_pictures
from pipelines.strict import validated

# losses that compare maps: they have no layer that every network has
OF_MAPS = [key for key, loss in LOSSES.items() if loss.takes_layers and not loss.default_layers]


def run_of(loss: str, layers: dict[str, str], **params: Any) -> RunConfig:
    content = {
        "student": {"name": "convnet", "params": {"width": 4}},
        "teacher": {"name": "convnet", "weights": "none.safetensors", "source": "live"},
        "data": {"name": "digits", "limit": 50},
        "epochs": 1,
        "batch_size": 8,
        "losses": {"it": {"loss": loss, "layers": layers, "params": params}},
    }
    return validated(RunConfig, content, where="toy")


def build(run: RunConfig) -> None:
    build_step(run, read_pictures(run.data, "train"))


@pytest.mark.parametrize("pooling", ["gap", "gap+std"])
@pytest.mark.parametrize("loss", OF_MAPS)
def test_a_loss_of_maps_refuses_a_teacher_that_has_none(loss: str, pooling: str) -> None:
    there = {f"block{number}": f"block{number}@{pooling}" for number in (1, 2)}
    # the tests' own check of shapes speaks first where a loss would say it
    with pytest.raises(ValueError, match=r"(?s)^losses\.it: .*(\(2, \d+\)|f32\[2,\d+\])"):
        build(run_of(loss, there))


def test_losses_read_what_the_teacher_keeps() -> None:
    for loss, layers in [
        ("at", {"block1": "block1@at", "block2": "block2@pool4"}),
        ("fitnet", {"block1": "block1@channels3"}),
        ("mse", {"block1@gap+std": "block1@gap+std"}),
        ("rkd", {"block1": "block2@gap"}),
    ]:
        run = run_of(loss, layers)
        assert set(run.teacher_layers["convnet"]) == {"embedding", *layers.values()}
        build(run)


@pytest.mark.parametrize("loss", ["at", "at_paper"])
def test_an_attention_of_another_power_is_refused(loss: str) -> None:
    with pytest.raises(ValueError, match=r"'block1@at' keeps the attention of power 2 only"):
        run_of(loss, {"block1": "block1@at"}, power=4)
    run_of(loss, {"block1": "block1@at"}, power=2)
