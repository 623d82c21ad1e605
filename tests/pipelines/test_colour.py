"""Colours against Pillow, the standard library's hues, and plain formulas."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from pipelines.augment import JitterConfig
from pipelines.views.colour import blend, brightness, contrast, grey, hue, jitter, saturation
from pipelines.views.draws import draws_of, random_words
from pipelines.views.fixed_point import ONE
from pipelines.views.randaugment import TABLE

FACTORS = (0, ONE // 2, ONE, 87_381, 2 * ONE)


def pictures() -> Tensor:
    """Noise, a ramp, a dark picture, and one of a single colour."""
    ramp = torch.arange(3 * 16 * 12).reshape(3, 16, 12) * 255 // (3 * 16 * 12)
    noise = torch.randint(0, 256, (3, 16, 12), generator=torch.Generator().manual_seed(0))
    flat = torch.tensor([200, 10, 60])[:, None, None].expand(3, 16, 12)
    return torch.stack([noise, ramp, noise // 5, flat]).byte()


def pillow(change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    changed = [
        np.asarray(change(Image.fromarray(one.permute(1, 2, 0).numpy()))) for one in pictures()
    ]
    return np.stack(changed).astype(int)


def near(actual: Tensor, expected: np.ndarray, *, levels: int) -> None:
    if expected.ndim == 4:
        expected = expected.transpose(0, 3, 1, 2)
    assert actual.dtype is torch.uint8
    np.testing.assert_allclose(actual.numpy().astype(int), expected, rtol=0, atol=levels)


def every(value: int) -> Tensor:
    return torch.full((4,), value)


def test_grey_is_pillow_s() -> None:
    near(grey(pictures())[:, 0], pillow(lambda one: one.convert("L")), levels=0)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (brightness, ImageEnhance.Brightness),
        (contrast, ImageEnhance.Contrast),
        (saturation, ImageEnhance.Color),
    ],
)
def test_colours_are_pillow_s_but_rounded(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Image.Image], ImageEnhance._Enhance],
    factor: int,
) -> None:
    expected = pillow(lambda one: theirs(one).enhance(factor / ONE))  # which cuts the rest off
    near(ours(pictures(), every(factor)), expected, levels=1)


def test_blend_rounds_half_up_and_saturates() -> None:
    image, other = torch.tensor([10, 11, 250, 3]), torch.tensor([20, 20, 0, 255])
    shape = (4, 1, 1, 1)
    seen = blend(image.byte().view(shape), other.byte().view(shape), torch.tensor([ONE // 2] * 4))
    assert seen.flatten().tolist() == [15, 16, 125, 129]
    beyond = blend(image.byte().view(shape), other.byte().view(shape), torch.tensor([3 * ONE] * 4))
    assert beyond.flatten().tolist() == [0, 0, 255, 0]


@pytest.mark.parametrize("share", [-0.5, -0.3, -0.01, 0.0, 0.2, 1 / 3, 0.5])
def test_hue_turns_as_the_standard_library_s_hexcone(share: float) -> None:
    seen = hue(pictures(), every(round(share * ONE)))
    expected = np.zeros(seen.shape)
    for place in np.ndindex(4, 16, 12):
        red, green, blue = (pictures()[place[0], :, place[1], place[2]] / 255).tolist()
        angle, saturated, value = colorsys.rgb_to_hsv(red, green, blue)
        turned = colorsys.hsv_to_rgb((angle + share) % 1, saturated, value)
        expected[place[0], :, place[1], place[2]] = np.array(turned) * 255
    np.testing.assert_allclose(seen.numpy(), expected, rtol=0, atol=0.52)


@pytest.mark.parametrize("turn", [0, ONE // 3, -ONE // 3])
def test_no_turn_is_the_picture_and_a_third_moves_the_channels(turn: int) -> None:
    seen, image = hue(pictures(), every(turn)), pictures()
    expected = image if turn == 0 else image.roll(1 if turn > 0 else -1, dims=1)
    levels = 0 if turn == 0 else 1
    near(seen, expected.numpy().astype(int).transpose(0, 2, 3, 1), levels=levels)


def test_jitter_is_brightness_contrast_saturation_and_hue_of_those_drawn() -> None:
    samples, config = torch.arange(4), JitterConfig(hue=0.1, probability=0.5)
    draws = draws_of(samples, 5, seed=0, streams=["jitter"])
    first = draws.first["jitter"]
    fifth = random_words(samples, view=5, stream="jitter", seed=0, first=1)[:, 0]
    strength, turn = 26214, 6554  # 0.4 and 0.1 of 2^16
    factors = ONE - strength + (first[:, 1:] * (2 * strength + 1) // 2**32)
    expected = brightness(pictures(), factors[:, 0])
    expected = saturation(contrast(expected, factors[:, 1]), factors[:, 2])
    expected = hue(expected, fifth * (2 * turn + 1) // 2**32 - turn)
    chosen = (first[:, 0] < 2**31)[:, None, None, None]
    assert 0 < int(chosen.sum()) < 4
    expected = torch.where(chosen, expected, pictures())
    torch.testing.assert_close(jitter(pictures(), draws, config), expected, rtol=0, atol=0)


# --- RandAugment's table ------------------------------------------------------------------------


def strong(name: str, strength: int, sign: int = 1) -> Tensor:
    return TABLE[name](pictures(), strength, every(sign))


def test_equalize_is_pillow_s() -> None:
    near(strong("equalize", 0), pillow(ImageOps.equalize), levels=0)


def test_autocontrast_is_pillow_s_but_for_its_floating_point() -> None:
    near(strong("autocontrast", 0), pillow(ImageOps.autocontrast), levels=1)
    assert strong("autocontrast", 0)[2].amax(dim=(1, 2)).tolist() == [255] * 3


@pytest.mark.parametrize(("strength", "bits"), [(0, 8), (3, 8), (9, 7), (15, 6), (30, 4)])
def test_posterize_keeps_pillow_s_bits(strength: int, bits: int) -> None:
    near(strong("posterize", strength), pillow(lambda one: ImageOps.posterize(one, bits)), levels=0)


@pytest.mark.parametrize("strength", [2, 10, 30])
def test_solarize_is_pillow_s(strength: int) -> None:
    threshold = int(255 - 8.5 * strength)
    expected = pillow(lambda one: ImageOps.solarize(one, threshold))
    near(strong("solarize", strength), expected, levels=0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_sharpness_is_pillow_s_but_rounded(sign: int) -> None:
    def theirs(one: Image.Image) -> Image.Image:
        return ImageEnhance.Sharpness(one).enhance(1 + sign * 0.9 * 20 / 30)

    near(strong("sharpness", 20, sign), pillow(theirs), levels=1)
    assert ImageFilter.SMOOTH.filterargs[1] == 13


AFFINE = {
    "shear_x": lambda value, _: (1, value * 0.3, 0, 0, 1, 0),
    "shear_y": lambda value, _: (1, 0, 0, value * 0.3, 1, 0),
    "translate_x": lambda value, size: (1, 0, int(value * size[0] * 150 / 331), 0, 1, 0),
    "translate_y": lambda value, size: (1, 0, 0, 0, 1, int(value * size[1] * 150 / 331)),
}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", AFFINE)
def test_shear_and_translation_are_the_affine_maps_of_the_paper(name: str, sign: int) -> None:
    """Pillow's own, of a smooth picture, whose places are of pixels' corners."""
    height, width = 16, 12
    ramp = torch.arange(height)[:, None] * 5 + torch.arange(width) * 7 + 40
    seen = TABLE[name](ramp.byte()[None, None], 20, torch.tensor([sign]))[0, 0]
    a, b, c, d, e, f = AFFINE[name](sign * 20 / 30, (width, height))
    for y in range(height):
        for x in range(width):
            column, row = a * x + b * y + c, d * x + e * y + f
            if 0 <= column <= width - 1 and 0 <= row <= height - 1:
                assert abs(int(seen[y, x]) - (5 * row + 7 * column + 40)) <= 0.52
            elif not (-1 < column < width and -1 < row < height):
                assert int(seen[y, x]) == 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_rotation_is_about_the_centre(sign: int) -> None:
    size, degrees = 15, 30
    ramp = torch.arange(size)[:, None] * 5 + torch.arange(size) * 7 + 40
    seen = TABLE["rotate"](ramp.byte()[None, None], degrees, torch.tensor([sign]))[0, 0]
    angle, centre = np.radians(sign * degrees), (size - 1) / 2
    for y in range(4, 11):
        for x in range(4, 11):
            column = centre + np.cos(angle) * (x - centre) - np.sin(angle) * (y - centre)
            row = centre + np.sin(angle) * (x - centre) + np.cos(angle) * (y - centre)
            assert abs(int(seen[y, x]) - (5 * row + 7 * column + 40)) <= 0.55
    assert int(seen[0, 0]) == 0


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_moves_of_strength_0_are_the_picture(name: str, sign: int) -> None:
    torch.testing.assert_close(strong(name, 0, sign), pictures(), rtol=0, atol=0)
