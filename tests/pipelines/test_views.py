"""A view is a pure function of (sample, view number, seed), bit for bit."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcore.philox import philox
from pipelines.augment import AugmentConfig
from pipelines.views import (
    STREAMS,
    VERSION,
    check_replay,
    checksums,
    normalised,
    permutation,
    random_words,
    view,
)

CROP, FLIP = AugmentConfig(crop=2), AugmentConfig(flip=True)
BOTH = AugmentConfig(crop=2, flip=True)


def pictures(count: int = 64) -> Tensor:
    """Pictures of two channels, higher than wide, that differ in every pixel's neighbourhood."""
    number = torch.arange(count * 2 * 8 * 6).reshape(count, 2, 8, 6)
    return ((number * 2654435761) >> 7).remainder(256).to(torch.uint8)


SAMPLES = torch.arange(64) * 1_000_003 + 5


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- the generator ----------------------------------------------------------------------------


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The same in Python's own integers, from the figure of Salmon et al. 2011, section 3.3."""
    left0, right0, left1, right1 = counter
    key0, key1 = key
    for number in range(10):
        if number:
            key0 = (key0 + 0x9E3779B9) % 2**32  # golden ratio
            key1 = (key1 + 0xBB67AE85) % 2**32  # sqrt(3) - 1
        high0, low0 = divmod(0xD2511F53 * left0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * left1, 2**32)
        left0, right0, left1, right1 = high1 ^ right0 ^ key0, low1, high0 ^ right1 ^ key1, low0
    return left0, right0, left1, right1


# Random123, tests/kat_vectors, the lines `philox4x32 10`: counter, key, result
KNOWN = """
    00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
    ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
    243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_philox_gives_the_known_answers(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    counter, key, expected = words[:4], words[4:6], words[6:]
    assert philox(torch.tensor(counter), key).tolist() == expected
    assert list(plain_philox(tuple(counter), tuple(key))) == expected


WORD = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=5), st.tuples(WORD, WORD))
def test_philox_equals_plain_integers(
    counters: list[tuple[int, ...]], key: tuple[int, int]
) -> None:
    expected = [list(plain_philox(counter, key)) for counter in counters]
    assert philox(torch.tensor(counters), key).tolist() == expected


@settings(deadline=None)
@given(
    sample=st.integers(0, 2**63 - 1),
    number=WORD,
    stream=st.sampled_from(sorted(STREAMS)),
    seed=st.integers(0, 2**64 - 1),
)
def test_words_are_those_of_the_documented_counter_and_key(
    sample: int, number: int, stream: str, seed: int
) -> None:
    counter = (sample % 2**32, sample >> 32, number, STREAMS[stream])
    expected = plain_philox(counter, (seed % 2**32, seed >> 32))
    drawn = random_words(torch.tensor([sample]), view=number, stream=stream, seed=seed)
    assert drawn.tolist() == [list(expected)]


def test_samples_above_32_bits_draw_other_words() -> None:
    low = torch.arange(50)
    here = random_words(low, view=1, stream="crop", seed=0)
    there = random_words(low + 2**32, view=1, stream="crop", seed=0)
    assert not bool((here == there).all(dim=1).any())


def test_every_stream_draws_other_words() -> None:
    drawn = [random_words(SAMPLES, view=1, stream=name, seed=0) for name in STREAMS]
    assert len({tuple(row) for rows in drawn for row in rows.tolist()}) == len(STREAMS) * 64


def test_stream_numbers_are_never_used_twice() -> None:
    # these are in every cache: a new stream takes a new number, no number changes
    assert STREAMS | {"crop": 0, "flip": 1, "order": 2, "split": 3} == STREAMS
    assert len(set(STREAMS.values())) == len(STREAMS)


# --- views are replayed -----------------------------------------------------------------------


@pytest.mark.parametrize("augment", [CROP, FLIP, BOTH])
def test_a_batch_of_64_is_64_batches_of_one(augment: AugmentConfig) -> None:
    image = pictures()
    together = view(image, SAMPLES, 3, augment=augment, seed=11)
    alone = [
        view(image[row : row + 1], SAMPLES[row : row + 1], 3, augment=augment, seed=11)
        for row in range(64)
    ]
    exactly(together, torch.cat(alone))
    backwards = view(image.flip(0), SAMPLES.flip(0), 3, augment=augment, seed=11)
    exactly(together, backwards.flip(0))


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_a_view_does_not_depend_on_the_number_of_threads() -> None:
    # large enough for torch to share the work out
    image, samples = pictures().repeat(60, 1, 1, 1), torch.arange(64 * 60)
    torch.set_num_threads(1)
    one = view(image, samples, 5, augment=BOTH, seed=0)
    order = permutation(100_000, seed=0, epoch=0, stream="order")
    torch.set_num_threads(2)
    exactly(view(image, samples, 5, augment=BOTH, seed=0), one)
    exactly(permutation(100_000, seed=0, epoch=0, stream="order"), order)


PRINT_DIGEST = """
import hashlib, torch
from pipelines.augment import AugmentConfig
from pipelines.views import permutation, view
number = torch.arange(64 * 2 * 8 * 6).reshape(64, 2, 8, 6)
image = ((number * 2654435761) >> 7).remainder(256).to(torch.uint8)
samples = torch.arange(64) * 1_000_003 + 5
torch.manual_seed(99)
seen = view(image, samples, 7, augment=AugmentConfig(crop=2, flip=True), seed=2**40 + 1)
order = permutation(64, seed=5, epoch=6, stream="order")
print(hashlib.sha256(seen.numpy().tobytes() + order.numpy().tobytes()).hexdigest())
"""


def test_a_view_is_the_same_in_another_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST], capture_output=True, text=True, check=True
    )
    seen = view(pictures(), SAMPLES, 7, augment=BOTH, seed=2**40 + 1)
    order = permutation(64, seed=5, epoch=6, stream="order")
    content = seen.numpy().tobytes() + order.numpy().tobytes()
    assert done.stdout.strip() == hashlib.sha256(content).hexdigest()


def test_a_view_is_the_same_next_year() -> None:
    # whoever changes this digest makes every cache stale, and has to count VERSION up
    assert VERSION == 1
    seen = view(pictures(), SAMPLES, 7, augment=BOTH, seed=3)
    assert (
        hashlib.sha256(seen.numpy().tobytes()).hexdigest()
        == "bb139811710096f66e4395d7aae91dbd4a9b3c1fb8213040d2c91ac7cf848886"
    )


def test_a_view_does_not_touch_torch_s_random_state() -> None:
    before = torch.get_rng_state()
    view(pictures(), SAMPLES, 1, augment=BOTH, seed=0)
    permutation(10, seed=0, epoch=0, stream="order")
    exactly(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_view_is_the_same_on_a_gpu() -> None:
    image, samples = pictures().cuda(), SAMPLES.cuda()
    there = view(image, samples, 7, augment=BOTH, seed=3).cpu()
    exactly(there, view(pictures(), SAMPLES, 7, augment=BOTH, seed=3))


# --- what a view shows ------------------------------------------------------------------------


def drawn_offsets(samples: Tensor, number: int, crop: int, seed: int) -> list[tuple[int, int]]:
    rows = random_words(samples, view=number, stream="crop", seed=seed).tolist()
    return [tuple(word * (2 * crop + 1) // 2**32 for word in row[:2]) for row in rows]


def drawn_flips(samples: Tensor, number: int, seed: int) -> list[bool]:
    rows = random_words(samples, view=number, stream="flip", seed=seed).tolist()
    return [row[0] % 2 == 1 for row in rows]


@pytest.mark.parametrize("augment", [CROP, FLIP, BOTH, AugmentConfig(crop=9, flip=True)])
def test_a_view_is_a_padded_slice_and_its_mirror(augment: AugmentConfig) -> None:
    image, pad = pictures(), augment.crop
    offsets, flips = drawn_offsets(SAMPLES, 4, pad, 3), drawn_flips(SAMPLES, 4, 3)
    expected = np.zeros(image.shape, dtype=np.uint8)
    for row, (down, right) in enumerate(offsets):
        padded = np.pad(image[row].numpy(), [(0, 0), (pad, pad), (pad, pad)])
        shown = padded[:, down : down + 8, right : right + 6]
        expected[row] = shown[:, :, ::-1] if augment.flip and flips[row] else shown
    seen = view(image, SAMPLES, 4, augment=augment, seed=3)
    assert seen.dtype is torch.uint8
    assert seen.is_contiguous()
    np.testing.assert_array_equal(seen.numpy(), expected)


@pytest.mark.parametrize("augment", [CROP, FLIP, BOTH])
def test_view_0_is_the_picture(augment: AugmentConfig) -> None:
    exactly(view(pictures(), SAMPLES, 0, augment=augment, seed=3), pictures())


def test_without_operations_every_view_is_the_picture() -> None:
    exactly(view(pictures(), SAMPLES, 9, augment=AugmentConfig(), seed=3), pictures())


def test_views_and_seeds_differ_and_the_picture_is_left_alone() -> None:
    image = pictures()
    seen = [
        view(image, SAMPLES, number, augment=BOTH, seed=seed)
        for number, seed in ((1, 0), (2, 0), (1, 1), (1, 2**32))
    ]
    assert len({one.numpy().tobytes() for one in [image, *seen]}) == 5
    exactly(image, pictures())


def test_every_offset_occurs_and_half_are_flipped() -> None:
    samples = torch.arange(2500)
    # each pixel holds its place, so that one pixel of the view tells offset and mirror
    place = torch.arange(1, 31).reshape(1, 1, 5, 6).expand(2500, 1, 5, 6).to(torch.uint8)
    seen = view(place, samples, 1, augment=BOTH, seed=0)
    centre, next_to_it = seen[:, 0, 2, 2].long() - 1, seen[:, 0, 2, 3].long() - 1
    mirrored = next_to_it < centre
    column = torch.where(mirrored, centre.remainder(6) - 1, centre.remainder(6))
    counts = Counter(zip((centre // 6).tolist(), column.tolist(), strict=True))
    assert set(counts) == {(row, column) for row in range(5) for column in range(5)}
    # 25 cells of 100 expected: the chi-square of 24 degrees is below 51 but once in a thousand
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 51
    assert 1150 < int(mirrored.sum()) < 1350


def test_turning_flip_on_does_not_shift_the_crop() -> None:
    cropped = view(pictures(), SAMPLES, 2, augment=CROP, seed=0)
    both = view(pictures(), SAMPLES, 2, augment=BOTH, seed=0)
    flipped = torch.tensor(drawn_flips(SAMPLES, 2, 0))
    assert 0 < int(flipped.sum()) < 64
    exactly(both[~flipped], cropped[~flipped])
    exactly(both[flipped], cropped[flipped].flip(-1))


# --- replay is checked ------------------------------------------------------------------------


def test_a_checksum_is_the_crc_of_a_picture_s_bytes() -> None:
    image = pictures().contiguous(memory_format=torch.channels_last)
    expected = [zlib.crc32(bytes(one.flatten().tolist())) for one in image]
    assert checksums(image).tolist() == expected
    assert checksums(image).dtype == np.uint32


def test_a_view_that_is_not_what_the_teacher_saw_is_refused() -> None:
    rows = np.arange(100, 164)
    kept = checksums(view(pictures(), SAMPLES, 2, augment=BOTH, seed=0))
    again = view(pictures(), SAMPLES, 2, augment=BOTH, seed=0)
    check_replay(again, kept, rows=rows, number=2)
    again[3, 0, 0, 0] ^= 1
    again[60, 1, 7, 5] ^= 128
    with pytest.raises(ValueError, match=r"view 2 of rows \[103, 160\] \(2 of 64\) is not what"):
        check_replay(again, kept, rows=rows, number=2)


# --- orders and normalisation -----------------------------------------------------------------


@settings(deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_a_permutation_has_every_number_once(count: int, seed: int, epoch: int) -> None:
    order = permutation(count, seed=seed, epoch=epoch, stream="order")
    assert sorted(order.tolist()) == list(range(count))


def test_a_permutation_differs_by_epoch_seed_and_stream() -> None:
    orders = [
        permutation(50, seed=0, epoch=0, stream="order"),
        permutation(50, seed=0, epoch=1, stream="order"),
        permutation(50, seed=1, epoch=0, stream="order"),
        permutation(50, seed=0, epoch=0, stream="split"),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_a_permutation_sorts_the_first_63_bits() -> None:
    drawn = [plain_philox((number, 0, 6, STREAMS["order"]), (5, 0)) for number in range(40)]
    expected = sorted(range(40), key=lambda number: drawn[number][:2])
    assert permutation(40, seed=5, epoch=6, stream="order").tolist() == expected


def test_a_permutation_is_the_same_next_year() -> None:
    assert permutation(10, seed=0, epoch=0, stream="order").tolist() == [
        3,
        4,
        5,
        2,
        8,
        1,
        9,
        7,
        0,
        6,
    ]
    assert permutation(10, seed=0, epoch=0, stream="split").tolist() == [
        2,
        6,
        8,
        4,
        7,
        0,
        9,
        5,
        1,
        3,
    ]
    assert permutation(10, seed=7, epoch=3, stream="order").tolist() == [
        5,
        8,
        2,
        4,
        0,
        7,
        1,
        6,
        3,
        9,
    ]


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.25,)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)
def test_normalised_equals_the_formula(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    image = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16).expand(2, len(mean), -1, -1)
    result = normalised(image, mean=mean, std=std)
    assert result.dtype is torch.float32
    centre, spread = (np.array(value)[:, None, None] for value in (mean, std))
    expected = (image.numpy().astype(np.float64) / 255 - centre) / spread
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-6)
