"""Every operation of a view obeys the same laws: integers, one stream, one picture at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.augment import AugmentConfig
from pipelines.views import OPERATIONS, STREAMS, mixed, mixture, view
from pipelines.views.randaugment import TABLE

CASES: Mapping[str, dict[str, Any]] = {
    "crop": {"crop": 2},
    "flip": {"flip": True},
    "resized_crop": {"resized_crop": {}},
    "jitter": {"jitter": {"hue": 0.1, "probability": 0.8}},
    "randaugment": {"randaugment": {}},
    "strong randaugment": {"randaugment": {"operations": 4, "magnitude": 30}},
    "erase": {"erase": {}},
    "erase with grey": {"erase": {"fill": 127, "probability": 1}},
    "mixup": {"mixup": {"alpha": 0.2}},
    "cutmix": {"cutmix": {"probability": 1}},
    "all": {
        "resized_crop": {},
        "flip": True,
        "jitter": {"hue": 0.5},
        "randaugment": {},
        "erase": {},
        "mixup": {},
        "cutmix": {},
    },
}
# sha256 of view 7: who changes one makes caches stale, and has to count VERSION up
DIGESTS: Mapping[str, str] = {
    "crop": "b19973c213211fee",
    "flip": "a9566c263590833e",
    "resized_crop": "f9a451a8684c1586",
    "jitter": "985d55fdc82ef396",
    "randaugment": "5a448c5bb4ca7be1",
    "strong randaugment": "f16f5899ab074a79",
    "erase": "0e267586037a2618",
    "erase with grey": "4f42f0b69fd53f5b",
    "mixup": "2d1be944c247c863",
    "cutmix": "776858389735c6f6",
    "all": "041ad3e6d1b88fe7",
}
SAMPLES = torch.arange(64) * 1_000_003 + 5


def pictures(count: int = 64, channels: int = 3) -> Tensor:
    """Colour pictures, higher than wide, that differ in every pixel's neighbourhood."""
    number = torch.arange(count * channels * 9 * 7).reshape(count, channels, 9, 7)
    return ((number * 2654435761) >> 7).remainder(256).to(torch.uint8)


def settings(case: str) -> AugmentConfig:
    return AugmentConfig.model_validate(CASES[case])


def shown(image: Tensor, samples: Tensor, number: int, case: str, seed: int = 3) -> Tensor:
    """A view as ``data.seen_as`` makes it, mixed with the picture of the same row 64 further on."""
    augment = settings(case)
    seen = view(image, samples, number, augment=augment, seed=seed)
    if not augment.mixes:
        return seen
    other = view(image.flip(3), samples + 64, number, augment=augment, seed=seed)
    size = image.shape[2], image.shape[3]
    how = mixture(samples, number, size=size, augment=augment, seed=seed)
    return mixed(seen, other, how)


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_operation_is_among_the_cases_and_has_a_stream() -> None:
    assert set(OPERATIONS) | {"mixup", "cutmix"} <= set(CASES)
    assert set(AugmentConfig.model_fields) == set(OPERATIONS) | {"mixup", "cutmix"}
    assert set(AugmentConfig.model_fields) <= set(STREAMS)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_64_is_64_batches_of_one(case: str) -> None:
    image = pictures()
    together = shown(image, SAMPLES, 3, case)
    assert (together.dtype, together.shape) == (torch.uint8, image.shape)
    alone = [shown(image[row : row + 1], SAMPLES[row : row + 1], 3, case) for row in range(64)]
    exactly(together, torch.cat(alone))
    exactly(together, shown(image.flip(0), SAMPLES.flip(0), 3, case).flip(0))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("case", ["all", "strong randaugment"])
def test_a_view_does_not_depend_on_the_number_of_threads(case: str) -> None:
    image, samples = pictures().repeat(60, 1, 1, 1), torch.arange(64 * 60)
    torch.set_num_threads(1)
    one = shown(image, samples, 5, case)
    torch.set_num_threads(2)
    exactly(shown(image, samples, 5, case), one)


@pytest.mark.parametrize("case", CASES)
def test_a_view_is_the_same_next_year(case: str) -> None:
    content = shown(pictures(), SAMPLES, 7, case).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == DIGESTS[case]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_view_is_the_same_on_a_gpu(case: str) -> None:
    there = shown(pictures().cuda(), SAMPLES.cuda(), 7, case).cpu()
    exactly(there, shown(pictures(), SAMPLES, 7, case))


@pytest.mark.parametrize("case", CASES)
def test_views_and_seeds_differ_and_the_picture_is_left_alone(case: str) -> None:
    image = pictures()
    seen = [shown(image, SAMPLES, number, case, seed) for number, seed in ((1, 0), (2, 0), (1, 1))]
    assert len({one.numpy().tobytes() for one in [image, *seen]}) == 4
    exactly(image, pictures())


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("mixup", "cutmix")])
@pytest.mark.parametrize("layout", ["channels last", "a slice"])
def test_a_view_does_not_depend_on_the_layout_in_memory(case: str, layout: str) -> None:
    image = pictures()
    if layout == "channels last":
        same = image.contiguous(memory_format=torch.channels_last)
    else:
        same = torch.cat([image, image], dim=3)[..., :7]
    exactly(view(same, SAMPLES, 2, augment=settings(case), seed=0), shown_alone(image, case))


def shown_alone(image: Tensor, case: str) -> Tensor:
    return view(image, SAMPLES, 2, augment=settings(case), seed=0)


class Integers(TorchDispatchMode):
    """Refuses every operation of torch that gives a floating-point tensor."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            assert not (isinstance(one, Tensor) and one.is_floating_point()), str(func)
        return result


@pytest.mark.parametrize("case", CASES)
def test_no_floating_point_number_decides_a_pixel(case: str) -> None:
    image, other = pictures(), pictures().flip(0)
    augment = settings(case)
    how = mixture(SAMPLES, 7, size=(9, 7), augment=augment, seed=3)  # its share weighs labels
    assert {how.level.dtype, *(one.dtype for one in how.box)} == {torch.int64}
    with Integers():
        seen = view(image, SAMPLES, 7, augment=augment, seed=3)
        assert mixed(seen, other, how).dtype is torch.uint8
    with pytest.raises(AssertionError), Integers():
        image.float()


STREAMS_OF = {name: {name} for name in CASES} | {
    "strong randaugment": {"randaugment"},
    "erase with grey": {"erase"},
    "all": set(OPERATIONS) - {"crop"} | {"mixup", "cutmix"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_operation_draws_from_its_own_stream(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shown(pictures(), SAMPLES, 7, case)
    for stream in STREAMS:
        with monkeypatch.context() as patch:
            patch.setitem(STREAMS, stream, 1000)
            same = bool((shown(pictures(), SAMPLES, 7, case) == before).all())
        assert same == (stream not in STREAMS_OF[case]), stream


def test_adding_an_operation_does_not_shift_another() -> None:
    erased = view(pictures(), SAMPLES, 2, augment=settings("erase with grey"), seed=0)
    both = AugmentConfig.model_validate({**CASES["erase with grey"], "jitter": {}, "flip": True})
    places = view(pictures(), SAMPLES, 2, augment=both, seed=0) == 127
    assert bool(places[(erased == 127).all(dim=1, keepdim=True).expand_as(places)].all())


@pytest.mark.parametrize("case", ["jitter", "strong randaugment"])
def test_grey_pictures_have_views_too_and_two_channels_are_refused(case: str) -> None:
    grey = pictures(channels=1)
    exactly(shown(grey, SAMPLES, 7, case)[:, 0], shown(grey, SAMPLES, 7, case).squeeze(1))
    assert bool((shown(grey, SAMPLES, 7, case) != grey).any())
    with pytest.raises(ValueError, match=r"1 or 3 channels, and these have 2; leave them out"):
        shown(pictures(channels=2), SAMPLES, 7, case)


@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch_has_a_view(case: str) -> None:
    assert shown(pictures()[:0], SAMPLES[:0], 7, case).shape == (0, 3, 9, 7)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_tiny_pictures_have_views(case: str, size: int) -> None:
    image = pictures()[:, :, :size, :size].contiguous()
    assert shown(image, SAMPLES, 7, case).shape == image.shape


def test_randaugment_draws_every_operation_of_the_paper() -> None:
    assert len(TABLE) == 14
