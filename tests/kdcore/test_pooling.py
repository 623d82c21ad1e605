"""What is kept of a layer: each pooling by a loop, and the same loss from what is kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kdcore.losses.attention import attention_distance, attention_transfer
from kdcore.models import MODELS
from kdcore.pooling import POOLINGS, pooling_of, split_pooling
from kdcore.taps import Tapped

MAPS = torch.randn(3, 5, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def by_loop(name: str) -> Tensor:
    rows = []
    for picture in MAPS:
        values = [channel.flatten().tolist() for channel in picture]
        mean = [sum(held) / len(held) for held in values]
        squared = [
            sum((one - centre) ** 2 for one in held) / len(held)
            for held, centre in zip(values, mean, strict=True)
        ]
        rows.append(mean + [math.sqrt(one) for one in squared] if name == "gap+std" else mean)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", ["gap", "gap+std"])
def test_moments_of_channels_are_those_of_a_loop(name: str) -> None:
    same(pooling_of(f"layer@{name}")(MAPS), by_loop(name))


def test_a_coarse_map_has_the_means_of_its_parts() -> None:
    maps = MAPS[..., :4]  # 8 x 4 positions: two rows to each of the 4 x 4
    same(pooling_of("layer@pool4")(maps), maps.unflatten(2, (4, 2)).mean(dim=3))


@pytest.mark.parametrize("loss", [attention_transfer, attention_distance])
def test_attention_transfer_reads_the_same_from_the_attention_alone(loss: nn.Module) -> None:
    student = torch.randn(3, 2, 8, 6, dtype=torch.float64)
    kept = pooling_of("layer@at")(MAPS)
    assert kept.shape == (3, 1, 8, 6)
    same(loss(student, kept), loss(student, MAPS))


def test_a_projection_keeps_distances_on_average_and_is_the_same_everywhere() -> None:
    maps = torch.randn(2, 400, 1, 1)
    kept = pooling_of("layer@channels256")(maps)
    before, after = (held[0].sub(held[1]).square().sum().item() for held in (maps, kept))
    assert after == pytest.approx(before, rel=0.35)  # 4 deviations of sqrt(2 / 256)
    # whoever changes these makes every cache that holds a projection stale
    first = pooling_of("layer@channels2")(torch.eye(3, dtype=torch.float64)[..., None, None])
    expected = [[-0.8349, 0.1052], [0.9558, 0.6566], [0.4514, 0.2231]]
    torch.testing.assert_close(
        first[:, :, 0, 0], torch.tensor(expected).double(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", [*POOLINGS, "channels3"])
def test_a_tap_gives_the_pooled_layer_beside_the_whole(name: str) -> None:
    net = MODELS["convnet"](5, width=2).eval()
    features = Tapped(net, ["block1", f"block1@{name}"])(torch.randn(4, 3, 8, 8)).features
    assert set(features) == {"embedding", "block1", f"block1@{name}"}
    expected = pooling_of(f"block1@{name}")(features["block1"])
    torch.testing.assert_close(features[f"block1@{name}"], expected, rtol=0, atol=0)


def test_a_layer_without_a_pooling_is_kept_in_full() -> None:
    assert split_pooling("layer3") == ("layer3", "full")
    assert split_pooling("layer3@full") == ("layer3", "full")
    kept = pooling_of("layer3@full")(MAPS)
    kept.zero_()
    assert bool(MAPS.any())


@pytest.mark.parametrize("name", [*POOLINGS, "channels3"])
def test_what_is_no_map_is_refused_with_its_shape(name: str) -> None:
    net = MODELS["convnet"](5, width=2)
    with pytest.raises(ValueError, match=r"'classifier@.*needs a map.*got \(1, 5\).*without '@"):
        Tapped(net, [f"classifier@{name}"])(torch.randn(1, 3, 8, 8))


def test_an_unknown_pooling_is_refused_with_the_nearest() -> None:
    net = MODELS["convnet"](5, width=2)
    with pytest.raises(ValueError, match=r"pooling of 'block1@gapp' 'gapp'; did you mean 'gap'"):
        Tapped(net, ["block1@gapp"])
    with pytest.raises(ValueError, match=r"layer of Sequential 'blok1'; did you mean 'block1'"):
        Tapped(net, ["blok1@gap"])
    with pytest.raises(ValueError, match="unknown pooling"):
        Tapped(net, ["block1@channels0"])
