"""Losses on maps that say little or shout: finite, with a finite gradient, or a clear error.

Batches of one and features of zeros are in test_edges.py, with those of every other loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES, Stateful
from kdcore.types import Batch, Classifier, Outputs, Probe

KEYS = [key for key, loss in LOSSES.items() if loss.takes_layers and not loss.default_layers]


def network(rows: int, width: int, resolution: int) -> Outputs:
    maps = {
        "early": torch.randn(rows, 2, 2 * resolution, 2 * resolution),
        "map": torch.randn(rows, width, resolution, resolution),
    }
    classifier = Classifier(torch.randn(5, width), torch.randn(5))
    return Outputs(torch.randn(rows, 5), maps, classifier)


def case(rows: int, resolution: int = 3) -> tuple[Outputs, Batch]:
    teacher = network(rows, 4, resolution)
    index = torch.arange(rows)
    return network(rows, 3, resolution), Batch(torch.randn(rows, 3, 8, 8), index, index, teacher)


def changed(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    return replace(outputs, features={name: change(it) for name, it in outputs.features.items()})


def first_channel_dead(maps: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(maps[:, :1]), maps[:, 1:]], dim=1)


def constant(maps: Tensor) -> Tensor:
    return torch.full_like(maps, 3.0)


def huge(maps: Tensor) -> Tensor:
    return maps * 1e4


def check_finite(key: str, student: Outputs, batch: Batch) -> None:
    loss = LOSSES[key]
    layers = {"early": "early", "map": "map"} if isinstance(loss, Stateful) else {"map": "map"}
    asking = changed(student, lambda maps: maps.clone().requires_grad_())
    term = loss.build({}, layers, Probe(asking, batch))
    value = term(asking, batch.teacher, batch)
    assert bool(value.isfinite())
    value.backward()
    gradients: Mapping[str, Tensor | None] = {
        **{name: asking.features[name].grad for name in layers},
        **{name: parameter.grad for name, parameter in term.named_parameters()},
    }
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name


@pytest.mark.parametrize("change", [first_channel_dead, constant, huge])
@pytest.mark.parametrize("key", KEYS)
def test_maps_that_say_little_or_shout_give_finite_numbers(
    key: str, change: Callable[[Tensor], Tensor]
) -> None:
    student, batch = case(rows=2)
    teacher = changed(batch.teacher, change)
    check_finite(key, changed(student, change), batch)
    check_finite(key, student, replace(batch, teacher=teacher))
    check_finite(key, changed(student, change), replace(batch, teacher=teacher))


@pytest.mark.parametrize("key", KEYS)
def test_maps_of_one_position_are_ordinary_maps(key: str) -> None:
    student, batch = case(rows=2, resolution=1)
    check_finite(key, student, batch)


@pytest.mark.parametrize("key", ["reviewkd", "simkd", "norm", "diffkd"])
def test_one_picture_of_one_position_cannot_be_normalised_and_says_so(key: str) -> None:
    student, batch = case(rows=1, resolution=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        check_finite(key, student, batch)
