"""Replayable augmentation: a view is a pure function of (sample, view number, seed).

Random numbers come from a counter, not from a state: Philox4x32-10 of (sample, view, stream), one
stream per operation. So a view is the same in any batch, process, machine and year, and a new
operation never shifts the numbers of another. Pixels and what decides them are integers throughout:
processors and versions of torch round floating-point numbers differently, integers never.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import VERSION, AugmentConfig
from pipelines.views.colour import jitter
from pipelines.views.draws import STREAMS, Draws, draws_of, permutation, random_words
from pipelines.views.erasing import erase
from pipelines.views.geometry import crop, flip, resized_crop
from pipelines.views.mixing import Mixture, mixed, mixture
from pipelines.views.randaugment import randaugment

__all__ = [
    "STREAMS",
    "VERSION",
    "Mixture",
    "check_replay",
    "checksums",
    "mixed",
    "mixture",
    "normalised",
    "permutation",
    "random_words",
    "view",
]

# What is done to one picture, in this order; named as the settings and the streams are.
OPERATIONS: Mapping[str, Callable[[Tensor, Draws, Any], Tensor]] = {
    "crop": crop,
    "resized_crop": resized_crop,
    "flip": flip,
    "jitter": jitter,
    "randaugment": randaugment,
    "erase": erase,
}


def view(
    image: Tensor, sample: Tensor, number: int, *, augment: AugmentConfig, seed: int
) -> Tensor:
    """The pictures as view ``number`` shows them, unmixed: uint8 (B, C, H, W) to the same.

    View 0 is the picture itself. ``mixture`` and ``mixed`` make pictures of two of these.
    """
    on = [name for name in OPERATIONS if getattr(augment, name)]
    if number == 0 or not on:
        return image
    draws = draws_of(sample, number, seed=seed, streams=on)
    for name in on:
        image = OPERATIONS[name](image, draws, getattr(augment, name))
    return image


def checksums(image: Tensor) -> np.ndarray:
    """CRC-32 of the pixels of each picture, as uint32: what a cache keeps of a view."""
    pixels = image.cpu().contiguous().numpy()
    return np.array([zlib.crc32(one) for one in pixels], np.uint32)


def check_replay(image: Tensor, expected: np.ndarray, *, rows: np.ndarray, number: int) -> None:
    """Raise ValueError unless every picture has the checksum that was kept of it."""
    differing = checksums(image) != expected
    if differing.any():
        raise ValueError(
            f"view {number} of rows {rows[differing][:5].tolist()} ({differing.sum()} of "
            f"{len(rows)}) is not what the teacher saw: the pictures or the code of "
            "pipelines/views changed under the cache; run `kd cache` into another folder"
        )


def normalised(image: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, C, H, W) to float32: (image / 255 - mean) / std, for each channel or for all.

    Raises ValueError for as many means as fit neither; torch would make grey pictures colour ones.
    """
    if {len(mean), len(std)} - {1, image.shape[1]}:
        raise ValueError(
            f"data.mean and data.std need one number or one per channel ({image.shape[1]}), got "
            f"{tuple(mean)} and {tuple(std)}"
        )
    scale = 1 / (255 * torch.tensor(std, device=image.device))
    shift = -torch.tensor(mean, device=image.device) / torch.tensor(std, device=image.device)
    # in place, since memory is what this waits for
    return image.float().mul_(scale[:, None, None]).add_(shift[:, None, None])
